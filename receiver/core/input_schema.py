"""A generation's input against its model's `input_schema`, before it costs; pure.

The schema is Clipia's, open-ended, and comes in two shapes: a map of names to descriptions, and
`{"parameters": [{"name", …}, …]}`. A false refusal stops paid work, while a mistake that is missed here is
still Clipia's to refuse or to warn of. So only what is surely understood is enforced, and the rest lets pass:

- a schema of another shape refuses nothing; one that is unreadable in part refuses no unknown keys, for that
  part may declare them;
- a key that the model does not know is told apart (`unknown`): Clipia takes it, with a warning at the most;
- a type word that is not in `_KINDS`, options that contradict their type, and two descriptions of one name
  leave the values of that parameter unchecked;
- options that are no list of plain values, bounds that are no numbers or that cross, count as absent;
- a parameter's own default always fits.
"""

import difflib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final, TypeGuard

MAX_MISFITS: Final = 20
MAX_LISTED: Final = 12
MAX_SHOWN: Final = 40

_PLAIN: Final = str | int | float | None
_MAX_NAME: Final = 64  # of a key that is looked up among the declared names: difflib is quadratic
_MAX_BITS: Final = 128  # of an integer that is written out: as many as fit into MAX_SHOWN digits


@dataclass(frozen=True, kw_only=True)
class Misfit:
    """One thing wrong with an input."""

    parameter: str  # the key as it was given or declared, however long
    message: str  # for the caller; bounded in length, and quotes no value longer than `MAX_SHOWN` characters
    unknown: bool = False  # whether it is only that the model's schema does not have the key


def check_input(schema: object, given: Mapping[str, Any]) -> tuple[Misfit, ...]:
    """Return what is wrong with an input, at most `MAX_MISFITS` things; empty where it may be submitted.

    `schema` is the model's `input_schema` as parsed from JSON, of any shape, or None. Null counts as not
    given. The order is fixed: required parameters that are missing as the schema lists them, then what does
    not fit and what the model does not know as the input lists it. Unknown keys, however many, take no place
    from anything else. Raises nothing.
    """
    found = list(_misfits(schema, given))
    room = MAX_MISFITS - sum(not misfit.unknown for misfit in found)
    kept = []
    for misfit in found:
        room -= misfit.unknown
        if room >= 0 or not misfit.unknown:
            kept.append(misfit)
    return tuple(kept[:MAX_MISFITS])


def _misfits(schema: object, given: Mapping[str, Any]) -> Iterator[Misfit]:
    parameters, complete = _read(schema)
    unknown = 0
    for name, parameter in parameters.items():
        if parameter.required and given.get(name) is None:
            yield _misfit(name, f"is required: {parameter.wanted(parameter.kind)}")
    for name, value in given.items():
        if name in parameters:
            trouble = parameters[name].trouble(value)
            if trouble:
                yield _misfit(name, trouble)
        elif complete and unknown < MAX_MISFITS:
            unknown += 1
            close = difflib.get_close_matches(name[:_MAX_NAME], parameters, n=1)
            hint = f"; did you mean {_shown(close[0])}?" if close else "."
            trouble = f"is not known to this model{hint} It takes {_listing(parameters)}"
            yield _misfit(name, trouble, unknown=True)


def _misfit(name: str, trouble: str, *, unknown: bool = False) -> Misfit:
    return Misfit(parameter=name, message=f"Parameter {_shown(name)} {trouble}.", unknown=unknown)


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """What a type word stands for. The bounds are keys of a description, for the value or for its length."""

    noun: str
    fits: Callable[[object], bool]
    lowest: tuple[str, ...] = ()
    highest: tuple[str, ...] = ()
    has_length: bool = False


def _is_number(value: object) -> TypeGuard[float]:
    # NaN and the infinities are no JSON. And math.isfinite(10**400) raises.
    return (isinstance(value, int) and not isinstance(value, bool)) or (
        isinstance(value, float) and math.isfinite(value)
    )


def _is_integer(value: object) -> bool:
    return _is_number(value) and value % 1 == 0


_BOOLEAN: Final = _Kind(noun="a boolean", fits=lambda value: isinstance(value, bool))
_INTEGER: Final = _Kind(
    noun="an integer", fits=_is_integer, lowest=("min", "minimum"), highest=("max", "maximum")
)
_NUMBER: Final = _Kind(
    noun="a number", fits=_is_number, lowest=("min", "minimum"), highest=("max", "maximum")
)
_STRING: Final = _Kind(
    noun="a string",
    fits=lambda value: isinstance(value, str),
    lowest=("min", "minLength"),
    highest=("max", "maxLength"),
    has_length=True,
)
_ARRAY: Final = _Kind(
    noun="an array",
    fits=lambda value: isinstance(value, list | tuple),
    lowest=("minItems",),
    highest=("maxItems",),
    has_length=True,
)
_OBJECT: Final = _Kind(noun="an object", fits=lambda value: isinstance(value, Mapping))

_KINDS: Final[Mapping[str, _Kind | None]] = {
    "string": _STRING,
    "str": _STRING,
    "text": _STRING,
    "textarea": _STRING,
    "url": _STRING,
    "uri": _STRING,
    "integer": _INTEGER,
    "int": _INTEGER,
    "number": _NUMBER,
    "numeric": _NUMBER,
    "float": _NUMBER,
    "double": _NUMBER,
    "boolean": _BOOLEAN,
    "bool": _BOOLEAN,
    "array": _ARRAY,
    "list": _ARRAY,
    "object": _OBJECT,
    "dict": _OBJECT,
    # These say nothing of the type: the options decide, or else the bounds as the value's own type has them.
    "enum": None,
    "select": None,
    "choice": None,
    "dropdown": None,
}
"""Every type word that is understood, in lower case.

Words of forms such as "image", "file", "slider" or "multiselect" are left out on purpose: whether a value is
one thing or a list, a URL or an object, is not to be told from them.
"""


def _kind_of(value: object) -> _Kind | None:
    kinds = (_BOOLEAN, _NUMBER, _STRING, _ARRAY, _OBJECT)
    return next((kind for kind in kinds if kind.fits(value)), None)


@dataclass(frozen=True, kw_only=True)
class _Parameter:
    """What is understood of one parameter; by default nothing, so that any value fits."""

    required: bool = False
    kind: _Kind | None = None  # None: any
    default: Any = None
    options: tuple[Any, ...] = ()  # the values, or in an array the items, that fit; empty: no list of them
    facts: Mapping[str, Any] = field(default_factory=dict)

    def trouble(self, value: object) -> str | None:
        """Return what is wrong with a value and what would be right."""
        if value is None or _same(value, self.default):
            return None
        kind = self.kind or _kind_of(value)
        if kind is None or self._takes(value, kind):
            return None
        return f"must be {self.wanted(kind)}, not {_described(value)}"

    def wanted(self, kind: _Kind | None) -> str:
        """Describe the values that fit, of a kind where one is known."""
        if self.options:
            return f"{'an array of' if self.kind is _ARRAY else 'one of'} {_listing(self.options)}"
        if kind is None:
            return "any value"
        low, high = self._bounds(kind)
        if low is None and high is None:
            return kind.noun
        if low is None or high is None:
            bounds = f"of at most {_shown(high)}" if low is None else f"of at least {_shown(low)}"
        else:
            bounds = f"from {_shown(low)} to {_shown(high)}"
        return f"{kind.noun} {'with a length ' if kind.has_length else ''}{bounds}"

    def _takes(self, value: Any, kind: _Kind) -> bool:
        if not kind.fits(value):
            return False
        if self.options:
            chosen = value if kind is _ARRAY else (value,)
            return all(any(_same(one, option) for option in self.options) for one in chosen)
        low, high = self._bounds(kind)
        size = len(value) if kind.has_length else value
        return (low is None or low <= size) and (high is None or size <= high)

    def _bounds(self, kind: _Kind) -> tuple[Any, Any]:
        """Return the inclusive bounds, None where there is none; crossed ones would refuse everything."""
        low = max(filter(_is_number, map(self.facts.get, kind.lowest)), default=None)
        high = min(filter(_is_number, map(self.facts.get, kind.highest)), default=None)
        return (None, None) if low is not None and high is not None and low > high else (low, high)


def _read(schema: object) -> tuple[dict[str, _Parameter], bool]:
    """Return the parameters by name, and whether they are surely all that the model takes."""
    if not isinstance(schema, Mapping):
        return {}, False
    listed = schema.get("parameters")
    # A map may have a parameter that is called "parameters"; its description is an object.
    if isinstance(listed, list):
        entries = [(entry.get("name"), entry) for entry in listed if isinstance(entry, Mapping)]
        named = [(name, facts) for name, facts in entries if isinstance(name, str)]
        complete = len(named) == len(listed) and _groups_add_nothing(schema, {name for name, _ in named})
    else:
        named = [(name, facts) for name, facts in schema.items() if isinstance(facts, Mapping)]
        # Were types not asked for, JSON Schema would pass for a map of "properties", "required" and so on.
        complete = all(isinstance(facts, Mapping) and _word(facts) for facts in schema.values())
    parameters: dict[str, _Parameter] = {}
    for name, facts in named:
        parameters[name] = _Parameter() if name in parameters else _parameter(facts)
    return parameters, complete and bool(parameters)


def _groups_add_nothing(schema: Mapping[str, Any], names: set[str]) -> bool:
    """Tell whether the groups beside a list of parameters hold those only: what they mean is not public."""
    groups = schema.get("parameterGroups")
    for group in groups if isinstance(groups, list) else ():
        for members in group.values() if isinstance(group, Mapping) else ():
            for member in members if isinstance(members, list) else ():
                name = member.get("name") if isinstance(member, Mapping) else member
                if not isinstance(name, str) or name not in names:
                    return False
    return True


def _parameter(facts: Mapping[str, Any]) -> _Parameter:
    default, options = facts.get("default"), _options(facts)
    required = facts.get("required") is True and default is None and None not in options
    word = _word(facts)
    if facts.get("type") is not None and word not in _KINDS:
        return _Parameter(required=required)
    kind = _KINDS.get(word)
    if kind not in (None, _ARRAY) and not all(one is None or kind.fits(one) for one in options):
        return _Parameter(required=required)
    return _Parameter(required=required, kind=kind, default=default, options=options, facts=facts)


def _word(facts: Mapping[str, Any]) -> str:
    word = facts.get("type")
    return word.strip().lower() if isinstance(word, str) else ""


def _options(facts: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the allowed values from either spelling; none where one of them is not plain."""
    for listed in (facts.get("enum"), facts.get("options")):
        if isinstance(listed, list):
            values = [one.get("value", one) if isinstance(one, Mapping) else one for one in listed]
            if values and all(isinstance(value, _PLAIN) for value in values):
                return tuple(values)
    return ()


def _same(value: object, plain: object) -> bool:
    """Compare as JSON does: 4 is 4.0 but true is not 1. What is not plain is equal to nothing."""
    if isinstance(value, bool) or isinstance(plain, bool):
        return value is plain
    # Never `==` of two nested values: deep ones exceed the recursion limit.
    return isinstance(value, str | int | float) and value == plain


def _described(value: object) -> str:
    if isinstance(value, str) and len(value) > MAX_SHOWN:
        return f"a string of {len(value)} characters"
    if isinstance(value, list | tuple):
        return f"an array of {len(value)}"
    if isinstance(value, Mapping):
        return "an object"
    return _shown(value) if isinstance(value, _PLAIN) else f"of Python's type {type(value).__name__}"


def _listing(values: Iterable[object]) -> str:
    shown = [_shown(value) for value in islice(values, MAX_LISTED + 1)]
    return ", ".join([*shown[:MAX_LISTED], "…"] if len(shown) > MAX_LISTED else shown)


def _shown(value: object) -> str:
    """Write a plain value as JSON, cut where it is long, with nothing in it that a terminal would obey."""
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        return "…"  # str() raises beyond 4,300 digits
    start = value[: MAX_SHOWN + 1] if isinstance(value, str) else value
    text = json.dumps(start, ensure_ascii=not str(start).isprintable())
    return text if len(text) <= MAX_SHOWN + 2 else f"{text[:MAX_SHOWN]}…"
