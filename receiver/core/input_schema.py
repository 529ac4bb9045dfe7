"""Checks a generation's input against its model's `input_schema` before it costs credits; pure.

The schema is Clipia's. It is open-ended and has two forms: a map of names to descriptions, and
`{"parameters": [{"name", …}, …]}`. If this check rejects a good input, paid work stops; if it misses a
mistake, Clipia still refuses the input or warns about it. So only the parts that are understood for sure are
enforced:

- A schema of another form rejects no input. If part of a schema is unreadable, unknown keys pass, because
  that part may declare them.
- Unknown keys are reported apart (`unknown`), because Clipia accepts them, at most with a warning.
- The values of a parameter are not checked if its type word is not in `_TYPES`, if its options contradict its
  type, or if its name is described twice.
- Options are ignored unless they are a list of plain values, and bounds unless they are numbers in order.
- The default of a parameter is always valid.
"""

import difflib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final, NamedTuple, TypeGuard

MAX_PROBLEMS: Final = 20
MAX_LISTED: Final = 12
MAX_SHOWN: Final = 40

_PLAIN: Final = str | int | float | None
_MAX_NAME: Final = 64  # of a key that is compared with the declared names: difflib is quadratic
_MAX_BITS: Final = 128  # of an integer that is written out: as many as fit into MAX_SHOWN digits


@dataclass(frozen=True, kw_only=True)
class InputProblem:
    """One problem of an input."""

    parameter: str
    """The key as given or declared; its length is not limited."""
    message: str
    """For the caller. Its length is limited, and quoted values have at most `MAX_SHOWN` characters."""
    unknown: bool = False
    """Whether the only problem is that the model's schema does not have the key."""


def check_input(schema: object, given: Mapping[str, Any]) -> tuple[InputProblem, ...]:
    """Return the problems of an input, at most `MAX_PROBLEMS`; empty if the input may be submitted.

    `schema` is the model's `input_schema` as parsed JSON of any form, or None. Null counts as not given.
    Missing required parameters come first, in the order of the schema; invalid values and unknown keys follow
    in the order of the input. If there are too many problems, unknown keys are dropped first. Raises no
    exception.
    """
    found = list(_problems(schema, given))
    unknown = [problem for problem in found if problem.unknown]
    dropped = unknown[max(0, MAX_PROBLEMS - (len(found) - len(unknown))) :]
    return tuple(problem for problem in found if problem not in dropped)[:MAX_PROBLEMS]


def _problems(schema: object, given: Mapping[str, Any]) -> Iterator[InputProblem]:
    parameters, complete = _read(schema)
    unknown = 0
    for name, parameter in parameters.items():
        if parameter.required and given.get(name) is None:
            yield _problem(name, f"is required: {parameter.expected(parameter.value_type)}")
    for name, value in given.items():
        if name in parameters:
            problem = parameters[name].problem(value)
            if problem:
                yield _problem(name, problem)
        elif complete and unknown < MAX_PROBLEMS:
            unknown += 1
            close = difflib.get_close_matches(name[:_MAX_NAME], parameters, n=1)
            hint = f"; did you mean {_json_text(close[0])}?" if close else "."
            problem = f"is not known to this model{hint} It takes {_list_text(parameters)}"
            yield _problem(name, problem, unknown=True)


def _problem(name: str, problem: str, *, unknown: bool = False) -> InputProblem:
    return InputProblem(parameter=name, message=f"Parameter {_json_text(name)} {problem}.", unknown=unknown)


class _Type(NamedTuple):
    """The meaning of a type word. `lowest` and `highest` are keys of bounds: for the value, or its length."""

    noun: str
    fits: Callable[[object], bool]
    lowest: tuple[str, ...] = ()
    highest: tuple[str, ...] = ()
    has_length: bool = False


def _is_number(value: object) -> TypeGuard[float]:
    # JSON has no NaN and no infinity. math.isfinite(10**400) would raise.
    return (isinstance(value, int) and not isinstance(value, bool)) or (
        isinstance(value, float) and math.isfinite(value)
    )


def _is_integer(value: object) -> bool:
    return _is_number(value) and value % 1 == 0


def _is_string(value: object) -> bool:
    return isinstance(value, str)


def _is_array(value: object) -> bool:
    return isinstance(value, list | tuple)


_VALUE_BOUNDS: Final = (("min", "minimum"), ("max", "maximum"))
_BOOLEAN: Final = _Type("a boolean", lambda value: isinstance(value, bool))
_INTEGER: Final = _Type("an integer", _is_integer, *_VALUE_BOUNDS)
_NUMBER: Final = _Type("a number", _is_number, *_VALUE_BOUNDS)
_STRING: Final = _Type("a string", _is_string, ("min", "minLength"), ("max", "maxLength"), has_length=True)
_ARRAY: Final = _Type("an array", _is_array, ("minItems",), ("maxItems",), has_length=True)
_OBJECT: Final = _Type("an object", lambda value: isinstance(value, Mapping))

_TYPES: Final[Mapping[str, _Type | None]] = {
    **dict.fromkeys(("string", "str", "text", "textarea", "url", "uri"), _STRING),
    **dict.fromkeys(("integer", "int"), _INTEGER),
    **dict.fromkeys(("number", "numeric", "float", "double"), _NUMBER),
    **dict.fromkeys(("boolean", "bool"), _BOOLEAN),
    **dict.fromkeys(("array", "list"), _ARRAY),
    **dict.fromkeys(("object", "dict"), _OBJECT),
    # These words have no type of their own: the options decide, or else the bounds for the type of the value.
    **dict.fromkeys(("enum", "select", "choice", "dropdown"), None),
}
"""All type words that are understood, in lower case.

Words of forms such as "image", "file", "slider" or "multiselect" are missing on purpose: they do not tell
whether a value is a single one or a list, a URL or an object.
"""


def _type_of(value: object) -> _Type | None:
    types = (_BOOLEAN, _NUMBER, _STRING, _ARRAY, _OBJECT)
    return next((value_type for value_type in types if value_type.fits(value)), None)


@dataclass(frozen=True, kw_only=True)
class _Parameter:
    """The understood part of one parameter's description; by default any value is valid."""

    required: bool = False
    value_type: _Type | None = None  # None: any type
    default: Any = None
    options: tuple[Any, ...] = ()  # valid values, or items of an array; empty: not limited
    description: Mapping[str, Any] = field(default_factory=dict)

    def problem(self, value: object) -> str | None:
        """Return the problem of a value and the values that are valid; None if it is valid."""
        if value is None or _equal(value, self.default):
            return None
        value_type = self.value_type or _type_of(value)
        if value_type is None or self._accepts(value, value_type):
            return None
        return f"must be {self.expected(value_type)}, not {_value_text(value)}"

    def expected(self, value_type: _Type | None) -> str:
        """Return the valid values in words."""
        if self.options:
            return f"{'an array of' if self.value_type is _ARRAY else 'one of'} {_list_text(self.options)}"
        if value_type is None:
            return "any value"
        low, high = self._bounds(value_type)
        if low is None and high is None:
            return value_type.noun
        if low is None or high is None:
            bounds = f"of at most {_json_text(high)}" if low is None else f"of at least {_json_text(low)}"
        else:
            bounds = f"from {_json_text(low)} to {_json_text(high)}"
        return f"{value_type.noun} {'with a length ' if value_type.has_length else ''}{bounds}"

    def _accepts(self, value: Any, value_type: _Type) -> bool:
        if not value_type.fits(value):
            return False
        if self.options:
            chosen = value if value_type is _ARRAY else (value,)
            return all(any(_equal(one, option) for option in self.options) for one in chosen)
        low, high = self._bounds(value_type)
        size = len(value) if value_type.has_length else value
        return (low is None or low <= size) and (high is None or size <= high)

    def _bounds(self, value_type: _Type) -> tuple[Any, Any]:
        """Return the inclusive bounds, each None if absent. Crossed ones are ignored: no value could pass."""
        low = max(filter(_is_number, map(self.description.get, value_type.lowest)), default=None)
        high = min(filter(_is_number, map(self.description.get, value_type.highest)), default=None)
        return (None, None) if low is not None and high is not None and low > high else (low, high)


def _read(schema: object) -> tuple[dict[str, _Parameter], bool]:
    """Return the parameters by name, and whether the model surely has no others."""
    if not isinstance(schema, Mapping):
        return {}, False
    listed = schema.get("parameters")
    # A map may have a parameter with the name "parameters"; its description is an object, not a list.
    described, complete = _read_list(schema, listed) if isinstance(listed, list) else _read_map(schema)
    parameters: dict[str, _Parameter] = {}
    for name, description in described:
        parameters[name] = _Parameter() if name in parameters else _parameter(description)
    return parameters, complete and bool(parameters)


_Described = list[tuple[str, Mapping[str, Any]]]


def _read_list(schema: Mapping[str, Any], listed: list[Any]) -> tuple[_Described, bool]:
    entries = [(entry.get("name"), entry) for entry in listed if isinstance(entry, Mapping)]
    described = [(name, description) for name, description in entries if isinstance(name, str)]
    names = {name for name, _ in described}
    return described, len(described) == len(listed) and _groups_are_listed(schema, names)


def _read_map(schema: Mapping[str, Any]) -> tuple[_Described, bool]:
    described = [(name, each) for name, each in schema.items() if isinstance(each, Mapping)]
    # Without the test for a type, a JSON Schema would pass for a map of "properties", "required" and so on.
    complete = len(described) == len(schema) and all(_type_word(each) for _, each in described)
    return described, complete


def _groups_are_listed(schema: Mapping[str, Any], names: set[str]) -> bool:
    """Tell whether the parameter groups have no other parameters. Their meaning is not documented."""
    groups = schema.get("parameterGroups")
    for group in groups if isinstance(groups, list) else ():
        for members in group.values() if isinstance(group, Mapping) else ():
            for member in members if isinstance(members, list) else ():
                name = member.get("name") if isinstance(member, Mapping) else member
                if not isinstance(name, str) or name not in names:
                    return False
    return True


def _parameter(description: Mapping[str, Any]) -> _Parameter:
    default, options = description.get("default"), _options(description)
    required = description.get("required") is True and default is None and None not in options
    word = _type_word(description)
    if description.get("type") is not None and word not in _TYPES:
        return _Parameter(required=required)
    value_type = _TYPES.get(word)
    if value_type not in (None, _ARRAY) and not all(one is None or value_type.fits(one) for one in options):
        return _Parameter(required=required)
    return _Parameter(
        required=required, value_type=value_type, default=default, options=options, description=description
    )


def _type_word(description: Mapping[str, Any]) -> str:
    word = description.get("type")
    return word.strip().lower() if isinstance(word, str) else ""


def _options(description: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the allowed values, which have two spellings; empty if one of them is not plain."""
    for listed in (description.get("enum"), description.get("options")):
        if isinstance(listed, list):
            values = [one.get("value", one) if isinstance(one, Mapping) else one for one in listed]
            if values and all(isinstance(value, _PLAIN) for value in values):
                return tuple(values)
    return ()


def _equal(value: object, plain: object) -> bool:
    """Compare as JSON values: 4 equals 4.0, but true does not equal 1. Lists and objects are never equal."""
    if isinstance(value, bool) or isinstance(plain, bool):
        return value is plain
    # `==` of two deeply nested values would exceed the recursion limit.
    return isinstance(value, str | int | float) and value == plain


def _value_text(value: object) -> str:
    if isinstance(value, str) and len(value) > MAX_SHOWN:
        return f"a string of {len(value)} characters"
    if isinstance(value, list | tuple):
        return f"an array of {len(value)}"
    if isinstance(value, Mapping):
        return "an object"
    return _json_text(value) if isinstance(value, _PLAIN) else f"a Python {type(value).__name__}"


def _list_text(values: Iterable[object]) -> str:
    shown = [_json_text(value) for value in islice(values, MAX_LISTED + 1)]
    return ", ".join([*shown[:MAX_LISTED], "…"] if len(shown) > MAX_LISTED else shown)


def _json_text(value: object) -> str:
    """Return a plain value as JSON, cut if it is long, and without control characters for a terminal."""
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        return "…"  # str() raises beyond 4,300 digits
    start = value[: MAX_SHOWN + 1] if isinstance(value, str) else value
    text = json.dumps(start, ensure_ascii=not str(start).isprintable())
    return text if len(text) <= MAX_SHOWN + 2 else f"{text[:MAX_SHOWN]}…"
