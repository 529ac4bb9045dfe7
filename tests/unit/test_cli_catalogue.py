"""`receiver models`: the output for each kind of model and price."""

from typing import Any

import pytest

from receiver.cli import catalogue
from receiver.sandbox.catalogue import listing, model_details


def shown(capsys: pytest.CaptureFixture[str], model: Any) -> str:
    """Return the output of `receiver models SLUG`."""
    catalogue._print_model(model)
    return capsys.readouterr().out


def test_the_list_has_every_model_with_its_price(capsys: pytest.CaptureFixture[str]) -> None:
    """A fixed price is a number, one that depends on the input is `estimate`, a text model's is per token."""
    catalogue._print_models(listing())
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["model", "type", "credits", "name"]
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    assert rows["nano-banana-2"] == ["image", "12", "Nano", "Banana", "2"]
    assert rows["video-upscale"] == ["video", "estimate", "Video", "Upscale"]
    assert rows["gpt-5.6-sol"] == ["text", "per", "token", "GPT-5.6", "Sol"]
    assert len(rows) == len(listing())


@pytest.mark.parametrize(
    ("pricing", "price"),
    [
        ({"credits": 0}, "0"),
        ({"credits": 12.5}, "12.5"),
        ({"estimate_required": True}, "estimate"),
        ({}, "estimate"),
        (None, "estimate"),
        ("odd", "estimate"),
        ({"available": False}, "unavailable"),
        ({"completion": "0.1"}, "per token"),
    ],
)
def test_price_in_the_list(capsys: pytest.CaptureFixture[str], pricing: Any, price: str) -> None:
    """A model is listed with its price, even if the price has an unknown shape."""
    catalogue._print_models([{"slug": "x", "type": "image", "name": "X", "pricing": pricing}])
    assert capsys.readouterr().out.splitlines()[1].split() == ["x", "image", *price.split(), "X"]


def test_one_model_with_its_price(capsys: pytest.CaptureFixture[str]) -> None:
    """One model is shown with its units, factors, text limits and parameters."""
    lines = shown(capsys, model_details("gemini-3-1-flash-tts")).splitlines()
    assert lines[:3] == [
        "gemini-3-1-flash-tts: Gemini 3.1 Flash TTS (audio)",
        "5 credits per 1000 characters",
        "text of 1 to 20000 characters",
    ]
    assert lines[3] == "  prompt: type string, required True, minLength 1, maxLength 20000"
    assert "40 credits varies with duration/resolution" in shown(capsys, model_details("seedance-2-fast-i2v"))
    factors = shown(capsys, model_details("seedance-2-fast-t2v")).splitlines()[2]
    assert factors == "  duration: 4 costs 1 times as much, 8 costs 2 times as much, 12 costs 3 times as much"
    assert "receiver estimate video-upscale --input" in shown(capsys, model_details("video-upscale"))
    assert "0.00000499875 USD per prompt token" in shown(capsys, model_details("gpt-5.6-sol"))


@pytest.mark.parametrize("schema", [None, [], "odd", {"parameters": ["odd"]}, {"prompt": "odd"}])
def test_odd_schema(capsys: pytest.CaptureFixture[str], schema: Any) -> None:
    """A model is shown even if its input schema has an unknown shape."""
    model = {"slug": "x", "name": "X", "type": "image", "pricing": {"credits": 1}, "input_schema": schema}
    assert shown(capsys, model) == "x: X (image)\n1 credits\n"
