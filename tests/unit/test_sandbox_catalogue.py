"""The sandbox's models: input, price, warnings, output and both shapes of `input_schema`."""

from typing import Any

import pytest

from receiver.sandbox.answers import Problem
from receiver.sandbox.catalogue import MODELS, TEXT_MODELS, find_model, listing, model_details


def file_url(number: int, extension: str) -> str:
    """Make URLs that show their arguments."""
    return f"{number}.{extension}"


@pytest.mark.parametrize(
    ("slug", "given", "price"),
    [
        ("nano-banana-2", {"prompt": "x"}, 12),
        ("nano-banana-2", {"prompt": "x", "num_images": 3}, 36),
        ("seedance-2-fast-t2v", {"prompt": "x"}, 40),
        ("seedance-2-fast-t2v", {"prompt": "x", "duration": 8}, 80),
        ("seedance-2-fast-t2v", {"prompt": "x", "duration": 12.0}, 120),
        ("seedance-2-fast-i2v", {"image_url": "https://x/y"}, 40),
        ("seedance-2-fast-i2v", {"image_url": "https://x/y", "duration": 8}, 80),
        ("seedance-2-fast-i2v", {"image_url": "https://x/y", "resolution": "480p"}, 20),
        ("seedance-2-fast-i2v", {"image_url": "https://x/y", "duration": 8, "resolution": "1080p"}, 160),
        ("video-upscale", {"video_url": "https://x/y"}, 20),
        ("video-upscale", {"video_url": "https://x/y", "scale": 4}, 40),
        ("gemini-3-1-flash-tts", {"prompt": "x" * 1000}, 5),
        ("gemini-3-1-flash-tts", {"prompt": "x" * 1001}, 10),
        ("suno-music", {"prompt": "x"}, 30),
    ],
)
def test_price_follows_the_input(slug: str, given: dict[str, Any], price: int) -> None:
    """The input determines the price: images, seconds, resolution, started thousands of characters."""
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
        (
            "seedance-2-fast-i2v",
            {"image_url": "https://x/y", "duration": 12},
            'Parameter "duration" must be one of 4, 8.',
        ),
    ],
)
def test_input_that_does_not_fit(slug: str, given: dict[str, Any], message: str) -> None:
    """An input outside the model's schema is invalid, and the message names the parameter."""
    with pytest.raises(Problem) as caught:
        find_model(slug).check(given)
    assert (caught.value.code, caught.value.status, str(caught.value)) == (
        "model_input_invalid",
        400,
        message,
    )


def test_warnings_name_what_is_ignored() -> None:
    """A key of another model is `unsupported`, others are `unknown`; both warnings name the model."""
    warnings = find_model("nano-banana-2").warnings({"prompt": "x", "duration": 4, "aspect_ration": "1:1"})
    assert [(warning["code"], warning["parameter"]) for warning in warnings] == [
        ("unsupported_parameter", "duration"),
        ("unknown_parameter", "aspect_ration"),
    ]
    takes = "nano-banana-2 takes: prompt, aspect_ratio, num_images, image_url."
    assert [warning["message"] for warning in warnings] == [
        f'Parameter "duration" is not supported by nano-banana-2 and was ignored. {takes}',
        f'Parameter "aspect_ration" is not recognized and was ignored. {takes}',
    ]
    assert find_model("nano-banana-2").warnings({"prompt": "x"}) == []


def test_output_by_kind() -> None:
    """Images have a display and an original file, a video is one object, audio repeats its first track."""
    two = {"prompt": "x", "num_images": 2}
    image, second = find_model("nano-banana-2").output(two, file_url, live=True)["images"]
    assert image == {"url": "1.webp", "original_url": "1.png", "width": 1024, "height": 1024}
    assert second["original_url"] == "2.png"
    video = find_model("seedance-2-fast-t2v").output({"prompt": "x"}, file_url, live=True)
    assert video == {"video": {"url": "1.mp4", "width": 640, "height": 360, "duration": 4}}
    first, other = {"url": "1.mp3", "format": "mp3"}, {"url": "2.mp3", "format": "mp3"}
    tracks = find_model("suno-music").output({"prompt": "x"}, file_url, live=True)
    assert tracks == {"audio": first, "audios": [first, other]}


def test_a_test_key_gets_one_sample_image() -> None:
    """A test key's output has one image with a `url` and no `original_url`, even if more were requested."""
    output = find_model("nano-banana-2").output({"prompt": "x", "num_images": 3}, file_url, live=False)
    assert output == {"images": [{"url": "1.png", "width": 1024, "height": 1024}]}


def test_documented_models() -> None:
    """The two models of the public documentation have its prices and parameters."""
    entries = {entry.get("slug"): entry for entry in listing()}
    assert entries["nano-banana-2"] == {
        "slug": "nano-banana-2",
        "type": "image",
        "name": "Nano Banana 2",
        "capabilities": ["text-to-image", "image-to-image"],
        "pricing": {"credits": 12},
    }
    assert model_details("seedance-2-fast-i2v") == {
        "slug": "seedance-2-fast-i2v",
        "type": "video",
        "name": "Seedance 2 Fast",
        "capabilities": ["image-to-video"],
        "pricing": {"credits": 40, "note": "varies with duration/resolution"},
        "input_schema": {
            "image_url": {"type": "string", "required": True},
            "prompt": {"type": "string", "required": False},
            "duration": {"type": "number", "required": False, "default": 4, "enum": [4, 8]},
            "resolution": {
                "type": "string",
                "required": False,
                "default": "720p",
                "enum": ["480p", "720p", "1080p"],
            },
            "aspect_ratio": {"type": "string", "required": False, "enum": ["16:9", "9:16", "1:1"]},
        },
    }


def test_prices_as_the_sdk_types_them() -> None:
    """The list has every kind of price that SDK 1.5.0 knows, and text limits of a speech model."""
    entries = {entry.get("slug") or entry["id"]: entry for entry in listing()}
    assert entries["video-upscale"]["pricing"]["estimate_required"] is True
    assert "credits" not in entries["video-upscale"]["pricing"]
    assert entries["seedance-2-fast-t2v"]["pricing"]["multipliers"] == {"duration": {"4": 1, "8": 2, "12": 3}}
    speech = entries["gemini-3-1-flash-tts"]
    assert speech["text_limits"] == {"min_chars": 1, "max_chars": 20_000}
    assert (
        speech["pricing"].items() >= {"credits": 5, "billing_unit": "characters", "unit_size": 1000}.items()
    )
    text = entries["gpt-5.6-sol"]
    assert ("slug" in text, text["pricing"]) == (False, {"prompt": "0.00000499875", "completion": "0.00003"})


def test_text_model_is_read_by_its_id() -> None:
    """A text model has the same attributes as in the list, but no job can be submitted to it."""
    assert model_details("gpt-5.6-sol") == TEXT_MODELS["gpt-5.6-sol"]
    with pytest.raises(Problem) as caught:
        find_model("gpt-5.6-sol")
    assert caught.value.code == "model_not_found"


def test_both_shapes_of_input_schema() -> None:
    """Older models have a map with `enum` as their schema, newer ones a list with `options`."""
    older = find_model("nano-banana-2").details()["input_schema"]
    ratios = ["1:1", "16:9", "9:16"]
    assert older["aspect_ratio"] == {"type": "string", "enum": ratios, "default": "1:1", "required": False}
    assert older["prompt"] == {"type": "string", "required": True, "minLength": 1, "maxLength": 4000}
    newer = find_model("seedance-2-fast-t2v").details()["input_schema"]["parameters"]
    assert newer[1] == {
        "name": "duration",
        "type": "number",
        "required": False,
        "default": 4,
        "options": [{"value": 4, "label": "4"}, {"value": 8, "label": "8"}, {"value": 12, "label": "12"}],
    }


def test_unknown_model() -> None:
    """An unknown slug is `model_not_found`."""
    with pytest.raises(Problem) as caught:
        find_model("nano-banana-1")
    assert (caught.value.code, caught.value.status) == ("model_not_found", 404)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_every_default_is_allowed(model: Any) -> None:
    """A default of a schema is a valid value and costs as much as leaving it out."""
    needed = {parameter.name: "x" for parameter in model.parameters if parameter.required}
    defaults = {p.name: p.default for p in model.parameters if p.default is not None}
    model.check(needed | defaults)
    assert model.price(needed | defaults) == model.price(needed)
