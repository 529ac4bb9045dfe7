"""The sandbox's models: their parameters, prices and outputs."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from receiver.sandbox.answers import Problem

FileUrl = Callable[[int, str], str]
"""Makes the URL of a generation's file from its number (the first is 1) and its extension."""
Price = Callable[[Mapping[str, Any]], int]
"""Computes the price of a valid input, in credits."""
_Factors = Mapping[str, Mapping[Any, float]]

_UNSET: Final = (None, -math.inf, math.inf)
_TYPES: Final[Mapping[str, type | tuple[type, ...]]] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
}


@dataclass(frozen=True)
class Parameter:
    """One key of a model's input. If `options` are given, other values are invalid; bounds are inclusive."""

    name: str
    type: str = "string"
    required: bool = False
    default: Any = None
    options: tuple[Any, ...] = ()
    minimum: float = -math.inf
    maximum: float = math.inf

    def check(self, value: object) -> None:
        """Raise `Problem` if `value` is invalid; the bounds of a string apply to its length."""
        is_boolean = self.type == "boolean"
        if not isinstance(value, _TYPES[self.type]) or isinstance(value, bool) is not is_boolean:
            raise _invalid(self.name, f"must be of type {self.type}")
        if self.options and value not in self.options:
            raise _invalid(self.name, f"must be one of {', '.join(map(str, self.options))}")
        size = len(value) if isinstance(value, str) else value
        if isinstance(size, int | float) and not self.minimum <= size <= self.maximum:
            raise _invalid(self.name, f"must be from {self.minimum:g} to {self.maximum:g}")

    def attributes(self) -> dict[str, Any]:
        """Return the attributes that are in both shapes of `input_schema`."""
        lowest, highest = ("minLength", "maxLength") if self.type == "string" else ("min", "max")
        attributes = {
            "type": self.type,
            "required": self.required,
            "default": self.default,
            lowest: self.minimum,
            highest: self.maximum,
        }
        return {key: value for key, value in attributes.items() if value not in _UNSET}


@dataclass(frozen=True, kw_only=True)
class Model:
    """One model of the catalogue.

    `pricing` is the price in the catalogue, and `price` computes it for a valid input. A live generation has
    `files` files. `schema_is_map` chooses the older shape of `input_schema`; Clipia uses both.
    """

    slug: str
    name: str
    type: str
    capabilities: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    pricing: Mapping[str, Any]
    price: Price
    files: Callable[[Mapping[str, Any]], int] = lambda _: 1
    text_limits: Mapping[str, int] | None = None
    schema_is_map: bool = False

    def check(self, given: Mapping[str, Any]) -> None:
        """Raise `Problem` if the input is invalid for this model."""
        for parameter in self.parameters:
            if parameter.name in given:
                parameter.check(given[parameter.name])
            elif parameter.required:
                raise _invalid(parameter.name, "is required")

    def warnings(self, given: Mapping[str, Any]) -> list[dict[str, str]]:
        """Return a warning for every key of the input that this model ignores."""
        declared = [parameter.name for parameter in self.parameters]
        return [_warning(key, self.slug, declared) for key in given if key not in declared]

    def output(self, given: Mapping[str, Any], file_url: FileUrl, *, live: bool) -> dict[str, Any]:
        """Return the `output` of a finished generation.

        A test key always gets one sample image, without an `original_url`.
        """
        numbers = range(1, self.files(given) + 1)
        match self.type:
            case "image" if live:
                return {
                    "images": [_image(file_url(n, "webp"), original_url=file_url(n, "png")) for n in numbers]
                }
            case "image":
                return {"images": [_image(file_url(1, "png"))]}
            case "video":
                return {"video": {"url": file_url(1, "mp4"), "width": 640, "height": 360, "duration": 4}}
            case _:
                tracks = [{"url": file_url(number, "mp3"), "format": "mp3"} for number in numbers]
                return {"audio": tracks[0], "audios": tracks}

    def list_entry(self) -> dict[str, Any]:
        """Return the model's entry in the list."""
        entry = {
            "slug": self.slug,
            "type": self.type,
            "name": self.name,
            "capabilities": list(self.capabilities),
            "pricing": dict(self.pricing),
        }
        return entry if self.text_limits is None else entry | {"text_limits": dict(self.text_limits)}

    def details(self) -> dict[str, Any]:
        """Return the list entry and the `input_schema`."""
        as_map, as_list = {}, []
        for each in self.parameters:
            options = [{"value": option, "label": str(option)} for option in each.options]
            as_map[each.name] = each.attributes() | ({"enum": list(each.options)} if options else {})
            as_list.append(
                {"name": each.name} | each.attributes() | ({"options": options} if options else {})
            )
        return self.list_entry() | {"input_schema": as_map if self.schema_is_map else {"parameters": as_list}}


def _image(url: str, **more: str) -> dict[str, Any]:
    return {"url": url, **more, "width": 1024, "height": 1024}


def _warning(key: str, slug: str, declared: list[str]) -> dict[str, str]:
    known = any(key == parameter.name for model in MODELS.values() for parameter in model.parameters)
    trouble = f"is not supported by {slug}" if known else "is not recognized"
    return {
        "code": "unsupported_parameter" if known else "unknown_parameter",
        "parameter": key,
        "message": f'Parameter "{key}" {trouble} and was ignored. {slug} takes: {", ".join(declared)}.',
    }


def _invalid(name: str, trouble: str) -> Problem:
    return Problem("model_input_invalid", f'Parameter "{name}" {trouble}.')


def _prompt(longest: int) -> Parameter:
    return Parameter("prompt", required=True, minimum=1, maximum=longest)


def _per_image(given: Mapping[str, Any]) -> int:
    return int(given.get("num_images", 1))


def _multiplied(credits_: int, *, by: _Factors) -> Price:
    """Return a price function: `credits_` times the factor of each parameter; that of a default is 1."""

    def price(given: Mapping[str, Any]) -> int:
        factors = (each[given[name]] for name, each in by.items() if name in given)
        return math.ceil(credits_ * math.prod(factors))

    return price


_I2V_FACTORS: Final[_Factors] = {"duration": {4: 1, 8: 2}, "resolution": {"480p": 0.5, "720p": 1, "1080p": 2}}
_LONGEST_SPEECH: Final = 20_000

MODELS: Final[Mapping[str, Model]] = {
    model.slug: model
    for model in (
        # The list entries of this model and the next, and the next one's schema, are as documented.
        Model(
            slug="nano-banana-2",
            name="Nano Banana 2",
            type="image",
            capabilities=("text-to-image", "image-to-image"),
            parameters=(
                _prompt(4_000),
                Parameter("aspect_ratio", default="1:1", options=("1:1", "16:9", "9:16")),
                Parameter("num_images", "integer", default=1, minimum=1, maximum=4),
                Parameter("image_url"),
            ),
            pricing={"credits": 12},
            price=lambda given: 12 * _per_image(given),
            files=_per_image,
            schema_is_map=True,
        ),
        Model(
            slug="seedance-2-fast-i2v",
            name="Seedance 2 Fast",
            type="video",
            capabilities=("image-to-video",),
            parameters=(
                Parameter("image_url", required=True),
                Parameter("prompt"),
                Parameter("duration", "number", default=4, options=(4, 8)),
                Parameter("resolution", default="720p", options=("480p", "720p", "1080p")),
                Parameter("aspect_ratio", options=("16:9", "9:16", "1:1")),
            ),
            pricing={"credits": 40, "note": "varies with duration/resolution"},
            price=_multiplied(40, by=_I2V_FACTORS),
            schema_is_map=True,
        ),
        Model(
            slug="seedance-2-fast-t2v",
            name="Seedance 2 Fast, text to video",
            type="video",
            capabilities=("text-to-video",),
            parameters=(
                _prompt(4_000),
                Parameter("duration", "number", default=4, options=(4, 8, 12)),
                Parameter("audio", "boolean", default=True),
            ),
            pricing={
                "credits": 40,
                "credits_base": 40,
                "multipliers": {"duration": {"4": 1, "8": 2, "12": 3}},
            },
            price=_multiplied(40, by={"duration": {4: 1, 8: 2, 12: 3}}),
        ),
        Model(
            slug="video-upscale",
            name="Video Upscale",
            type="video",
            capabilities=("video-to-video",),
            parameters=(
                Parameter("video_url", required=True),
                Parameter("scale", "integer", default=2, options=(2, 4)),
            ),
            pricing={
                "estimate_required": True,
                "billing_unit": "second",
                "note": "varies with the video's length",
            },
            # Every video is taken to last ten seconds.
            price=lambda given: 10 * int(given.get("scale", 2)),
        ),
        Model(
            slug="gemini-3-1-flash-tts",
            name="Gemini 3.1 Flash TTS",
            type="audio",
            capabilities=("text-to-speech",),
            parameters=(
                _prompt(_LONGEST_SPEECH),
                Parameter("voice", default="Zephyr", options=("Zephyr", "Kore")),
            ),
            pricing={
                "credits": 5,
                "billing_unit": "characters",
                "unit_size": 1000,
                "character_count": "unicode",
                "rounding": "up",
                "minimum_credits": 5,
                "available": True,
            },
            price=lambda given: 5 * math.ceil(len(given["prompt"]) / 1000),
            text_limits={"min_chars": 1, "max_chars": _LONGEST_SPEECH},
        ),
        Model(
            slug="suno-music",
            name="Suno Music",
            type="audio",
            capabilities=("text-to-music",),
            parameters=(_prompt(3_000), Parameter("instrumental", "boolean", default=False)),
            pricing={"credits": 30},
            price=lambda _: 30,
            files=lambda _: 2,
        ),
    )
}

TEXT_MODELS: Final[Mapping[str, Mapping[str, Any]]] = {
    "gpt-5.6-sol": {
        "id": "gpt-5.6-sol",
        "canonical_slug": "openai/gpt-5.6-sol",
        "object": "model",
        "created": 1_780_272_000,
        "owned_by": "openai",
        "name": "GPT-5.6 Sol",
        "context_length": 400_000,
        "architecture": {"input_modalities": ["text"], "output_modalities": ["text"]},
        "supported_parameters": ["max_tokens", "temperature"],
        "pricing": {"prompt": "0.00000499875", "completion": "0.00003"},
    }
}
"""Text models by id. In the list they have an `id` in place of a `slug`, and prices in USD per token."""


def find_model(slug: str) -> Model:
    """Return a media model. Raises `Problem` if there is none."""
    try:
        return MODELS[slug]
    except KeyError:
        raise Problem("model_not_found", f'There is no model "{slug}".') from None


def listing() -> list[dict[str, Any]]:
    """Return the entries of the list of models."""
    return [*(model.list_entry() for model in MODELS.values()), *map(dict, TEXT_MODELS.values())]


def model_details(name: str) -> dict[str, Any]:
    """Return a media model by its slug, or a text model by its id. Raises `Problem` if there is none."""
    return dict(TEXT_MODELS[name]) if name in TEXT_MODELS else find_model(name).details()
