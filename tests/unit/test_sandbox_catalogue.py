"""The sandbox's models: input, price, warnings, output and both shapes of `input_schema`."""

from typing import Any

import pytest

from receiver.sandbox.answers import Problem
from receiver.sandbox.catalogue import MODELS, find_model


def file_url(number: int, extension: str) -> str:
    """Make URLs that show what they were made from."""
    return f"{number}.{extension}"


@pytest.mark.parametrize(
    ("slug", "given", "price"),
    [
        ("nano-banana-2", {"prompt": "x"}, 12),
        ("nano-banana-2", {"prompt": "x", "num_images": 3}, 36),
        ("seedance-2-fast-t2v", {"prompt": "x"}, 40),
        ("seedance-2-fast-t2v", {"prompt": "x", "duration": 8}, 80),
        ("seedance-2-fast-i2v", {"image_url": "https://x/y", "duration": 12}, 120),
        ("gemini-3-1-flash-tts", {"prompt": "x" * 1000}, 5),
        ("gemini-3-1-flash-tts", {"prompt": "x" * 1001}, 10),
        ("suno-music", {"prompt": "x"}, 30),
    ],
)
def test_price_follows_the_input(slug: str, given: dict[str, Any], price: int) -> None:
    """The price is fixed by the input: images, seconds, started thousands of characters."""
    model = find_model(slug)
    model.check(given)
    assert model.price(given) == price


@pytest.mark.parametrize(
    ("slug", "given", "message"),
    [
        ("nano-banana-2", {}, 'Parameter "prompt" is required.'),
        ("nano-banana-2", {"prompt": ""}, 'Parameter "prompt" must be from 1 to 4000.'),
        ("nano-banana-2", {"prompt": "x" * 4001}, 'Parameter "prompt" must be from 1 to 4000.'),
        ("nano-banana-2", {"prompt": 1}, 'Parameter "prompt" must be of type string.'),
        ("nano-banana-2", {"prompt": None}, 'Parameter "prompt" must be of type string.'),
        ("nano-banana-2", {"prompt": "x", "num_images": 0}, 'Parameter "num_images" must be from 1 to 4.'),
        ("nano-banana-2", {"prompt": "x", "num_images": 5}, 'Parameter "num_images" must be from 1 to 4.'),
        (
            "nano-banana-2",
            {"prompt": "x", "num_images": 1.5},
            'Parameter "num_images" must be of type integer.',
        ),
        (
            "nano-banana-2",
            {"prompt": "x", "num_images": True},
            'Parameter "num_images" must be of type integer.',
        ),
        (
            "nano-banana-2",
            {"prompt": "x", "aspect_ratio": "2:1"},
            'Parameter "aspect_ratio" must be one of 1:1, 16:9, 9:16.',
        ),
        (
            "seedance-2-fast-t2v",
            {"prompt": "x", "duration": 5},
            'Parameter "duration" must be one of 4, 8, 12.',
        ),
        ("seedance-2-fast-t2v", {"prompt": "x", "audio": 1}, 'Parameter "audio" must be of type boolean.'),
        ("seedance-2-fast-i2v", {"prompt": "x"}, 'Parameter "image_url" is required.'),
    ],
)
def test_input_that_does_not_fit(slug: str, given: dict[str, Any], message: str) -> None:
    """Input outside the model's schema is refused with a message that names the parameter."""
    with pytest.raises(Problem) as caught:
        find_model(slug).check(given)
    assert (caught.value.code, caught.value.status, str(caught.value)) == (
        "model_input_invalid",
        400,
        message,
    )


def test_warnings_name_what_is_ignored() -> None:
    """A key that another model knows is `unsupported`, one that none knows is `unknown`."""
    warnings = find_model("nano-banana-2").warnings({"prompt": "x", "duration": 4, "aspect_ration": "1:1"})
    assert [(warning["code"], warning["parameter"]) for warning in warnings] == [
        ("unsupported_parameter", "duration"),
        ("unknown_parameter", "aspect_ration"),
    ]
    assert all(warning["parameter"] in warning["message"] for warning in warnings)
    assert find_model("nano-banana-2").warnings({"prompt": "x"}) == []


def test_output_by_kind() -> None:
    """Images have a display and an original file, a video is one object, audio repeats its first track."""
    image, second = find_model("nano-banana-2").output(2, file_url)["images"]
    assert image == {"url": "1.webp", "original_url": "1.png", "width": 1024, "height": 1024}
    assert second["original_url"] == "2.png"
    video = find_model("seedance-2-fast-t2v").output(1, file_url)
    assert video == {"video": {"url": "1.mp4", "width": 640, "height": 360, "duration": 4}}
    first, other = {"url": "1.mp3", "format": "mp3"}, {"url": "2.mp3", "format": "mp3"}
    assert find_model("suno-music").output(2, file_url) == {"audio": first, "audios": [first, other]}


def test_both_shapes_of_input_schema() -> None:
    """Older models describe their input as a map with `enum`, newer ones as a list with `options`."""
    older = find_model("seedance-2-fast-t2v").described()["input_schema"]
    assert older["duration"] == {"type": "number", "enum": [4, 8, 12], "default": 4, "required": False}
    assert older["prompt"] == {"type": "string", "required": True, "min": 1, "max": 4000}
    newer = find_model("seedance-2-fast-i2v").described()["input_schema"]["parameters"]
    assert newer[2] == {
        "name": "duration",
        "type": "number",
        "required": False,
        "default": 4,
        "options": [{"value": 4, "label": "4"}, {"value": 8, "label": "8"}, {"value": 12, "label": "12"}],
    }


def test_unknown_model() -> None:
    """A slug that is not in the catalogue is `model_not_found`."""
    with pytest.raises(Problem) as caught:
        find_model("nano-banana-1")
    assert (caught.value.code, caught.value.status) == ("model_not_found", 404)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_every_default_is_allowed(model: Any) -> None:
    """What a schema names as default passes its own check and costs as much as leaving it out."""
    needed = {parameter.name: "x" for parameter in model.parameters if parameter.required}
    defaults = {p.name: p.default for p in model.parameters if p.default is not None}
    model.check(needed | defaults)
    assert model.price(needed | defaults) == model.price(needed)
