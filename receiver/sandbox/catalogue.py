"""The sandbox's models: what they take, what they cost and what they give."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from receiver.sandbox.answers import Problem

FileUrl = Callable[[int, str], str]
"""Makes the URL of a generation's file from its number (from 1) and its extension."""

_TYPES: Final[Mapping[str, type | tuple[type, ...]]] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
}


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One key of a model's input. `options` are the only values allowed, bounds are inclusive."""

    name: str
    type: str = "string"
    required: bool = False
    default: Any = None
    options: tuple[Any, ...] = ()
    minimum: float | None = None
    maximum: float | None = None

    def check(self, value: object) -> None:
        """Raise `Problem` where `value` does not fit; a string is bounded by its length."""
        if not isinstance(value, _TYPES[self.type]) or isinstance(value, bool) is not (
            self.type == "boolean"
        ):
            raise _misfit(self.name, f"must be of type {self.type}")
        if self.options and value not in self.options:
            raise _misfit(self.name, f"must be one of {', '.join(map(str, self.options))}")
        size = len(value) if isinstance(value, str) else value
        if isinstance(size, int | float) and not self._low <= size <= self._high:
            raise _misfit(self.name, f"must be from {self._low:g} to {self._high:g}")

    @property
    def _low(self) -> float:
        return -math.inf if self.minimum is None else self.minimum

    @property
    def _high(self) -> float:
        return math.inf if self.maximum is None else self.maximum

    def facts(self) -> dict[str, Any]:
        """Return what both schema shapes say about it, without what does not apply."""
        facts = {
            "type": self.type,
            "required": self.required,
            "default": self.default,
            "min": self.minimum,
            "max": self.maximum,
        }
        return {key: value for key, value in facts.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Model:
    """One model of the catalogue.

    A generation costs `credits` for each of its `units`, and has `files` files. `schema_is_map` chooses the
    older shape of `input_schema`; both are in the wild.
    """

    slug: str
    name: str
    type: str
    capabilities: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    credits: int
    note: str | None = None
    units: Callable[[Mapping[str, Any]], int] = lambda _: 1
    files: Callable[[Mapping[str, Any]], int] = lambda _: 1
    schema_is_map: bool = False

    def check(self, given: Mapping[str, Any]) -> None:
        """Raise `Problem` where the input does not fit this model."""
        for parameter in self.parameters:
            if parameter.name in given:
                parameter.check(given[parameter.name])
            elif parameter.required:
                raise _misfit(parameter.name, "is required")

    def price(self, given: Mapping[str, Any]) -> int:
        """Return the cost in credits of a checked input."""
        return self.credits * self.units(given)

    def warnings(self, given: Mapping[str, Any]) -> list[dict[str, str]]:
        """Return a warning for every key of the input that this model ignores."""
        declared = [parameter.name for parameter in self.parameters]
        return [_warning(key, self.slug, declared) for key in given if key not in declared]

    def output(self, count: int, file_url: FileUrl) -> dict[str, Any]:
        """Return the `output` of a finished generation with `count` files."""
        match self.type:
            case "image":
                return {"images": [_image(number, file_url) for number in range(1, count + 1)]}
            case "video":
                return {"video": {"url": file_url(1, "mp4"), "width": 640, "height": 360, "duration": 4}}
            case _:
                tracks = [{"url": file_url(number, "mp3"), "format": "mp3"} for number in range(1, count + 1)]
                return {"audio": tracks[0], "audios": tracks}

    def listed(self) -> dict[str, Any]:
        """Return the model's entry in the list."""
        pricing = {"credits": self.credits, "note": self.note}
        return {
            "slug": self.slug,
            "type": self.type,
            "name": self.name,
            "capabilities": list(self.capabilities),
            "pricing": {key: value for key, value in pricing.items() if value is not None},
        }

    def described(self) -> dict[str, Any]:
        """Return the model by itself, with its `input_schema`."""
        schema = _as_map(self.parameters) if self.schema_is_map else {"parameters": _as_list(self.parameters)}
        return self.listed() | {"input_schema": schema}


def _as_map(parameters: tuple[Parameter, ...]) -> dict[str, Any]:
    return {
        parameter.name: parameter.facts() | ({"enum": list(parameter.options)} if parameter.options else {})
        for parameter in parameters
    }


def _as_list(parameters: tuple[Parameter, ...]) -> list[dict[str, Any]]:
    return [
        {"name": parameter.name}
        | parameter.facts()
        | (
            {"options": [{"value": o, "label": str(o)} for o in parameter.options]}
            if parameter.options
            else {}
        )
        for parameter in parameters
    ]


def _image(number: int, file_url: FileUrl) -> dict[str, Any]:
    return {
        "url": file_url(number, "webp"),
        "original_url": file_url(number, "png"),
        "width": 1024,
        "height": 1024,
    }


def _warning(key: str, slug: str, declared: list[str]) -> dict[str, str]:
    known = any(key == parameter.name for model in MODELS.values() for parameter in model.parameters)
    trouble = f"is not supported by {slug}" if known else "is not recognized"
    return {
        "code": "unsupported_parameter" if known else "unknown_parameter",
        "parameter": key,
        "message": f'Parameter "{key}" {trouble} and was ignored. Declared: {", ".join(declared)}.',
    }


def _misfit(name: str, trouble: str) -> Problem:
    return Problem("model_input_invalid", f'Parameter "{name}" {trouble}.')


def _prompt(longest: int) -> Parameter:
    return Parameter(name="prompt", required=True, minimum=1, maximum=longest)


_DURATION: Final = Parameter(name="duration", type="number", default=4, options=(4, 8, 12))

MODELS: Final[Mapping[str, Model]] = {
    model.slug: model
    for model in (
        Model(
            slug="nano-banana-2",
            name="Nano Banana 2",
            type="image",
            capabilities=("text-to-image", "image-to-image"),
            parameters=(
                _prompt(4_000),
                Parameter(name="aspect_ratio", default="1:1", options=("1:1", "16:9", "9:16")),
                Parameter(name="num_images", type="integer", default=1, minimum=1, maximum=4),
                Parameter(name="image_url"),
            ),
            credits=12,
            note="per image",
            units=lambda given: int(given.get("num_images", 1)),
            files=lambda given: int(given.get("num_images", 1)),
            schema_is_map=True,
        ),
        Model(
            slug="seedance-2-fast-t2v",
            name="Seedance 2 Fast, text to video",
            type="video",
            capabilities=("text-to-video",),
            parameters=(_prompt(4_000), _DURATION, Parameter(name="audio", type="boolean", default=True)),
            credits=10,
            note="per second",
            units=lambda given: int(given.get("duration", 4)),
            schema_is_map=True,
        ),
        Model(
            slug="seedance-2-fast-i2v",
            name="Seedance 2 Fast, image to video",
            type="video",
            capabilities=("image-to-video",),
            parameters=(
                Parameter(name="image_url", required=True, minimum=1),
                Parameter(name="prompt"),
                _DURATION,
            ),
            credits=10,
            note="per second",
            units=lambda given: int(given.get("duration", 4)),
        ),
        Model(
            slug="gemini-3-1-flash-tts",
            name="Gemini 3.1 Flash TTS",
            type="audio",
            capabilities=("text-to-speech",),
            parameters=(
                _prompt(20_000),
                Parameter(name="voice", default="Zephyr", options=("Zephyr", "Kore")),
            ),
            credits=5,
            note="per 1000 characters of the prompt",
            units=lambda given: math.ceil(len(given["prompt"]) / 1000),
        ),
        Model(
            slug="suno-music",
            name="Suno Music",
            type="audio",
            capabilities=("text-to-music",),
            parameters=(_prompt(3_000), Parameter(name="instrumental", type="boolean", default=False)),
            credits=30,
            files=lambda _: 2,
        ),
    )
}

TEXT_MODEL: Final[Mapping[str, Any]] = {
    "id": "gpt-5.6-sol",
    "object": "model",
    "name": "GPT-5.6 Sol",
    "context_length": 400_000,
    "pricing": {"prompt": "0.00000125", "completion": "0.00001"},
}
"""A text model: the list mixes them in, with an `id` and per-token prices in place of `slug`."""


def find_model(slug: str) -> Model:
    """Return the model; raises `Problem` where there is none."""
    try:
        return MODELS[slug]
    except KeyError:
        raise Problem("model_not_found", f'There is no model "{slug}".') from None
