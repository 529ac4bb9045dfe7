"""Inputs that are rejected before they cost: both forms, the sandbox as oracle, and hostile schemas."""

import datetime as dt
import math
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from receiver.core.input_schema import MAX_PROBLEMS, InputProblem, check_input
from receiver.sandbox.answers import Problem
from receiver.sandbox.catalogue import MODELS, Model, Parameter

LONGEST_MESSAGE = 1_000

PARAMETERS: dict[str, dict[str, Any]] = {
    "prompt": {"type": "string", "required": True, "min": 1, "max": 10},
    "duration": {"type": "number", "enum": [4, 8, 12], "default": 4, "required": False},
    "count": {"type": "integer", "min": 1, "max": 4},
    "scale": {"type": "float", "minimum": 0.5, "maximum": 2},
    "audio": {"type": "boolean", "default": True},
    "style": {"type": "select", "enum": ["plain", "bold", 3]},
    "tags": {"type": "array", "minItems": 1, "maxItems": 2},
    "effects": {"type": "list", "enum": ["blur", "glow"]},
    "extra": {"type": "object"},
    "title": {"type": "str", "minLength": 2, "maxLength": 3},
}


def with_options(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return a description as the list spells it: options with labels in place of the enum."""
    listed = {key: value for key, value in facts.items() if key != "enum"}
    if "enum" in facts:
        listed["options"] = [{"value": value, "label": f"<{value}>"} for value in facts["enum"]]
    return listed


AS_MAP = PARAMETERS
AS_LIST = {"parameters": [{"name": name} | with_options(facts) for name, facts in PARAMETERS.items()]}
both_shapes = pytest.mark.parametrize("schema", [AS_MAP, AS_LIST], ids=["map", "list"])


def check_one(facts: object, value: object) -> list[str]:
    """Return the problems of a value for this description, which are the same in both forms."""
    listed = with_options(facts) | {"name": "p"} if isinstance(facts, Mapping) else facts
    results = [check_input(schema, {"p": value}) for schema in ({"p": facts}, {"parameters": [listed]})]
    assert results[0] == results[1]
    return [problem.message for problem in results[0]]


@both_shapes
@pytest.mark.parametrize(
    "given_",
    [
        {},
        {"duration": 4},
        {"duration": 8.0},
        {"duration": None},
        {"count": 1},
        {"count": 4},
        {"count": 4.0},
        {"scale": 0.5},
        {"scale": 2},
        {"audio": False},
        {"style": "bold"},
        {"style": 3.0},
        {"tags": ["x"]},
        {"tags": ("x", 1)},
        {"effects": []},
        {"effects": ["glow", "blur"]},
        {"extra": {}},
        {"title": "ab"},
        {"title": "abc"},
        {"prompt": "ten chars."},
    ],
    ids=str,
)
def test_input_that_fits(schema: object, given_: dict[str, Any]) -> None:
    """Valid values pass in both forms: bounds are inclusive, 4.0 is an integer, null is not given."""
    assert check_input(schema, {"prompt": "x"} | given_) == ()


@both_shapes
@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("prompt", "", 'must be a string with a length from 1 to 10, not ""'),
        ("prompt", "eleven char", 'must be a string with a length from 1 to 10, not "eleven char"'),
        ("prompt", 7, "must be a string with a length from 1 to 10, not 7"),
        ("duration", 5, "must be one of 4, 8, 12, not 5"),
        ("duration", "4", 'must be one of 4, 8, 12, not "4"'),
        ("duration", [4], "must be one of 4, 8, 12, not an array of 1"),
        ("count", 0, "must be an integer from 1 to 4, not 0"),
        ("count", 5.0, "must be an integer from 1 to 4, not 5.0"),
        ("count", 1.5, "must be an integer from 1 to 4, not 1.5"),
        ("count", True, "must be an integer from 1 to 4, not true"),
        ("count", "2", 'must be an integer from 1 to 4, not "2"'),
        ("scale", 0.4, "must be a number from 0.5 to 2, not 0.4"),
        ("scale", 2.1, "must be a number from 0.5 to 2, not 2.1"),
        ("scale", False, "must be a number from 0.5 to 2, not false"),
        ("scale", math.nan, "must be a number from 0.5 to 2, not NaN"),
        ("scale", math.inf, "must be a number from 0.5 to 2, not Infinity"),
        ("audio", 1, "must be a boolean, not 1"),
        ("audio", "yes", 'must be a boolean, not "yes"'),
        ("style", "Bold", 'must be one of "plain", "bold", 3, not "Bold"'),
        ("style", {}, 'must be one of "plain", "bold", 3, not an object'),
        ("style", ["odd"], 'must be one of "plain", "bold", 3, not an array of 1'),
        ("tags", [], "must be an array with a length from 1 to 2, not an array of 0"),
        ("tags", ["a", "b", "c"], "must be an array with a length from 1 to 2, not an array of 3"),
        ("tags", "a", 'must be an array with a length from 1 to 2, not "a"'),
        ("effects", ["blur", "snow"], 'must be an array of "blur", "glow", not an array of 2'),
        ("effects", [["blur"]], 'must be an array of "blur", "glow", not an array of 1'),
        ("effects", "blur", 'must be an array of "blur", "glow", not "blur"'),
        ("extra", [1], "must be an object, not an array of 1"),
        ("extra", "{}", 'must be an object, not "{}"'),
        ("title", "a", 'must be a string with a length from 2 to 3, not "a"'),
        ("title", "abcd", 'must be a string with a length from 2 to 3, not "abcd"'),
        (
            "title",
            dt.date(2026, 1, 1),
            "must be a string with a length from 2 to 3, not a Python date",
        ),
    ],
)
def test_value_that_does_not_fit(schema: object, key: str, value: object, problem: str) -> None:
    """If a value is invalid, the message says why, and which values are valid."""
    message = f'Parameter "{key}" {problem}.'
    assert check_input(schema, {"prompt": "x"} | {key: value}) == (
        InputProblem(parameter=key, message=message),
    )


@both_shapes
def test_null_for_a_required_parameter_is_missing(schema: object) -> None:
    """If a required parameter is null or absent, it is reported once."""
    wanted = 'Parameter "prompt" is required: a string with a length from 1 to 10.'
    for nothing in ({}, {"prompt": None}):
        assert check_input(schema, nothing) == (InputProblem(parameter="prompt", message=wanted),)


@pytest.mark.parametrize(
    ("facts", "missing"),
    [
        ({"type": "string", "required": True}, True),
        ({"type": "string", "required": True, "default": None}, True),
        ({"type": "string", "required": True, "default": ""}, False),
        ({"type": "array", "required": True, "default": []}, False),
        ({"type": "select", "required": True, "enum": ["a", None]}, False),
        ({"type": "string", "required": 1}, False),
        ({"type": "string", "required": "true"}, False),
        ({"type": "string", "required": False}, False),
        ({"type": "string"}, False),
        ({"type": "hologram", "required": True}, True),
        ({"type": "boolean", "required": True, "enum": ["on"]}, True),
    ],
)
def test_missing_parameters(facts: dict[str, Any], *, missing: bool) -> None:
    """A parameter is missing only if it is `required: true`, has no default and must not be null."""
    assert bool(check_one(facts, None)) is missing


@both_shapes
def test_unknown_key_names_the_closest_and_the_declared(schema: object) -> None:
    """If a key has a typo, the message has the likely name and all names that the model accepts."""
    declared = ", ".join(f'"{name}"' for name in PARAMETERS)
    takes = f"It takes {declared}."
    assert [
        problem.message for problem in check_input(schema, {"prompt": "x", "duraton": 4, "zzz": None})
    ] == [
        f'Parameter "duraton" is not known to this model; did you mean "duration"? {takes}',
        f'Parameter "zzz" is not known to this model. {takes}',
    ]


@both_shapes
def test_an_unknown_key_is_marked(schema: object) -> None:
    """Only keys that the schema does not have are `unknown`: Clipia accepts them, and refuses the rest."""
    found = check_input(schema, {"title": 1, "nope": 1, "count": 9})
    assert [problem.parameter for problem in found if problem.unknown] == ["nope"]
    assert [problem.parameter for problem in found if not problem.unknown] == ["prompt", "title", "count"]


def test_unknown_keys_hide_no_mistake() -> None:
    """If there are too many unknown keys, invalid values are still reported."""
    schema = {"prompt": {"type": "string", "required": True}, "count": {"type": "integer", "max": 4}}
    unknown = {f"key{number}": 1 for number in range(3 * MAX_PROBLEMS)}
    found = check_input(schema, unknown | {"count": 9})
    assert [problem.parameter for problem in found if not problem.unknown] == ["prompt", "count"]
    assert len(found) == MAX_PROBLEMS


@both_shapes
def test_order_is_missing_first_then_as_given(schema: object) -> None:
    """Missing parameters come first, then the problems of the input in its own order."""
    found = check_input(schema, {"title": 1, "nope": 1, "audio": 1, "count": 9})
    assert [problem.parameter for problem in found] == ["prompt", "title", "nope", "audio", "count"]


def test_missing_parameters_come_in_the_order_of_the_schema() -> None:
    """If several parameters are missing, they are reported in the order of the schema."""
    schema = {name: {"type": "string", "required": True} for name in ("b", "a", "c")}
    assert [problem.parameter for problem in check_input(schema, {"a": ""})] == ["b", "c"]


@pytest.mark.parametrize(
    "schema",
    [
        None,
        True,
        7,
        "string",
        [],
        [{"name": "prompt", "type": "string", "required": True}],
        {},
        {"parameters": []},
        {"parameters": [{"name": "other", "type": "string"}, "prompt"]},
        {"parameters": [{"name": "other", "type": "string"}, {"type": "string"}]},
        {"parameters": [{"name": "other", "type": "string"}, {"name": 7, "type": "string"}]},
        {"parameters": {"prompt": {"type": "integer", "required": True}}},
        {"type": "object", "properties": {"prompt": {"type": "integer"}}, "required": ["prompt", "seed"]},
        {"properties": {"prompt": {"type": "integer"}}},
        {"other": {"type": "string"}, "more": "string"},
        {"other": {"type": "string"}, "nested": {"prompt": {"type": "integer"}}},
        {"other": {"type": "string"}, "more": {"type": ["string", "null"]}},
    ],
    ids=str,
)
def test_unreadable_schema_rejects_no_key(schema: object) -> None:
    """If a schema has another form, or is unreadable in part, unknown keys are accepted."""
    assert check_input(schema, {"prompt": "x"}) == ()


@pytest.mark.parametrize(
    ("facts", "value"),
    [
        ({"type": "hologram", "enum": ["a"], "min": 5}, "b"),
        ({"type": "multiselect", "enum": ["a"]}, ["b"]),
        ({"type": ["string", "null"], "enum": ["a"]}, 1),
        ({"type": 7, "max": 1}, 2),
        ({"type": "number", "enum": ["4", "8"]}, 4),
        ({"type": "number", "enum": ["4", "8"]}, "4"),
        ({"type": "string", "enum": [1080, 720]}, "1080"),
        ({"type": "object", "enum": ["a"]}, {"b": 1}),
        ({"type": "integer", "min": "one", "max": None}, -5),
        ({"type": "integer", "min": True, "max": False}, -5),
        ({"type": "number", "max": math.nan}, 5),
        ({"type": "number", "min": 9, "max": 1}, 5),
        ({"type": "string", "min": 9, "maxLength": 1}, "abc"),
        ({"type": "integer", "exclusiveMinimum": 5}, 1),
        ({"type": "string", "enum": "abc"}, "d"),
        ({"type": "string", "enum": {"a": "A"}}, "d"),
        ({"type": "string", "enum": []}, "d"),
        ({"type": "string", "enum": [["a"]]}, "d"),
        ({"type": "string", "options": [{"id": "a"}, {"id": "b"}]}, "d"),
        ({"type": "array", "min": 3}, ["a"]),
        ({"type": "select"}, {"any": "thing"}),
        ({"type": "boolean", "min": 5}, True),
        ({"required": True}, dt.date(2026, 1, 1)),
    ],
    ids=str,
)
def test_unclear_descriptions_reject_no_value(facts: dict[str, Any], value: object) -> None:
    """If the type is unknown, options contradict it or bounds are odd, the parameter is not checked."""
    assert check_input({"p": facts}, {"p": value}) == ()
    assert check_input({"parameters": [{"name": "p"} | facts]}, {"p": value}) == ()


@pytest.mark.parametrize(
    ("facts", "value"),
    [
        ({"type": "integer", "min": 0, "default": -1}, -1),
        ({"type": "integer", "default": "auto"}, "auto"),
        ({"type": "select", "enum": ["a"], "default": "auto"}, "auto"),
    ],
)
def test_default_always_fits(facts: dict[str, Any], value: object) -> None:
    """A parameter's own default is valid even if its description excludes it; other values are not."""
    assert check_one(facts, value) == []
    assert check_one({key: fact for key, fact in facts.items() if key != "default"}, value) != []


@pytest.mark.parametrize(
    ("facts", "fits", "problem"),
    [
        ({"type": " String "}, "x", 1),
        ({"type": "INT"}, 1, 1.5),
        ({"type": "double"}, 1.5, "1"),
        ({"type": "bool"}, True, 0),
        ({"type": "dict"}, {}, []),
        ({"type": "url"}, "https://x/y", ["https://x/y"]),
        ({"type": None, "enum": ["a", 4]}, 4.0, "b"),
        ({"enum": [True, "auto"]}, True, 1),
        ({"enum": [1, 0]}, 1.0, True),
        ({"min": 2, "max": 3}, 2, 4),
        ({"minLength": 2}, "ab", "a"),
        ({"type": "dropdown", "enum": ["a", "b"]}, ["a", "b"], ["a", "c"]),
        ({"type": "array", "enum": [1, 2]}, [1.0], [True]),
        ({"type": "array", "minItems": 2}, [1, 2], [1]),
        ({"type": "string", "enum": ["a", None]}, "a", "b"),
        ({"type": "string", "min": 1, "minLength": 3}, "abc", "ab"),
        ({"type": "number", "min": 10**400}, 10**400, 1e308),
        ({"type": "number", "min": 5, "enum": [4]}, 4, 6),
    ],
)
def test_spellings(facts: dict[str, Any], fits: object, problem: object) -> None:
    """Plausible spellings are understood: other words for the type, no type, other names of bounds."""
    assert check_one(facts, fits) == []
    assert len(check_one(facts, problem)) == 1


@pytest.mark.parametrize(
    ("facts", "wanted"),
    [
        ({"type": "integer", "min": 1}, "an integer of at least 1"),
        ({"type": "number", "max": 2.5}, "a number of at most 2.5"),
        ({"type": "string", "minLength": 2}, "a string with a length of at least 2"),
        ({"type": "array", "maxItems": 3}, "an array with a length of at most 3"),
        ({"type": "string", "enum": ["a", True, None]}, None),
        ({"type": "select", "enum": ["a", True, 1.5]}, 'one of "a", true, 1.5'),
        ({"type": "hologram"}, "any value"),
    ],
)
def test_the_message_for_a_missing_parameter(facts: dict[str, Any], wanted: str | None) -> None:
    """The message for a missing parameter describes the valid values if they are known."""
    messages = check_one(facts | {"required": True}, None)
    assert messages == ([f'Parameter "p" is required: {wanted}.'] if wanted else [])


def test_options_beside_an_unusable_enum() -> None:
    """If both spellings of options are present, the first one with plain values is used."""
    for enum in (None, [], [["a"]], "a"):
        schema = {"p": {"type": "string", "enum": enum, "options": [{"value": "b"}, "c"]}}
        assert check_input(schema, {"p": "b"}) == check_input(schema, {"p": "c"}) == ()
        assert len(check_input(schema, {"p": "a"})) == 1
    assert check_input({"p": {"type": "string", "enum": ["a"], "options": ["b"]}}, {"p": "a"}) == ()


def test_map_may_have_a_parameter_called_parameters() -> None:
    """The form depends on `parameters`: a list, or the description of a parameter with this name."""
    schema = {"parameters": {"type": "object", "required": True}, "prompt": {"type": "string"}}
    assert check_input(schema, {"parameters": {}, "prompt": "x"}) == ()
    found = check_input(schema, {"prompt": 1, "promt": "x"})
    assert [problem.parameter for problem in found] == ["parameters", "prompt", "promt"]


def test_two_descriptions_of_one_name_are_not_enforced() -> None:
    """If a name has two descriptions, neither is enforced, but the name is known and others are not."""
    one, other = ({"name": "p", "type": word, "required": True} for word in ("string", "integer"))
    schema = {"parameters": [one, other]}
    assert check_input(schema, {}) == check_input(schema, {"p": []}) == ()
    assert [problem.parameter for problem in check_input(schema, {"q": 1})] == ["q"]


@pytest.mark.parametrize(
    ("groups", "rejected"),
    [
        (None, True),
        ("advanced", True),
        ([], True),
        (["advanced", {"title": "Advanced", "open": True}], True),
        ([{"title": "Advanced", "parameters": ["prompt"]}], True),
        ([{"title": "Advanced", "parameters": [{"name": "prompt"}]}], True),
        ([{"title": "Advanced", "parameters": ["prompt", "seed"]}], False),
        ([{"title": "Advanced", "parameters": [{"name": "seed", "type": "integer"}]}], False),
        ([{"title": "Advanced", "parameters": [["seed"]]}], False),
    ],
)
def test_group_may_declare_more(groups: object, *, rejected: bool) -> None:
    """If groups have more than the listed parameters, no key is unknown, because they may declare it."""
    schema = {"parameters": [{"name": "prompt", "type": "string"}], "parameterGroups": groups}
    assert bool(check_input(schema, {"seed": 1})) is rejected


def test_known_part_of_an_incomplete_schema_is_enforced() -> None:
    """If one entry is unreadable, unknown keys are accepted, and the other checks stay."""
    schema = {"parameters": [{"name": "prompt", "type": "string", "required": True}, None]}
    assert [problem.parameter for problem in check_input(schema, {"seed": 1})] == ["prompt"]
    assert [problem.parameter for problem in check_input(schema, {"prompt": 1})] == ["prompt"]


def test_messages_are_bounded_and_quote_no_long_value() -> None:
    """If a value, a key or a schema has 20 kB, or a number is huge, the message is still short."""
    secret = "s" * 20_000
    schema = {
        "text": {"type": "string", "max": 9},
        "number": {"type": "integer", "max": 9},
        "style": {"type": "select", "enum": [secret, *range(13)]},
        secret: {"type": "string", "required": True, "min": 10**5_000},
    }
    given_ = {"text": secret, "number": 10**5_000, "style": [secret, secret[1:]], secret[1:]: 1}
    found = check_input(schema, given_)
    assert [problem.parameter for problem in found] == [secret, *given_]
    assert all(len(problem.message) < LONGEST_MESSAGE for problem in found)
    cut = '"' + "s" * 39 + "…"
    assert [problem.message for problem in found] == [
        f"Parameter {cut} is required: a string with a length of at least ….",
        'Parameter "text" must be a string with a length of at most 9, not a string of 20000 characters.',
        'Parameter "number" must be an integer of at most 9, not ….',
        f'Parameter "style" must be one of {cut}, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, …, not an array of 2.',
        f'Parameter {cut} is not known to this model. It takes "text", "number", "style", {cut}.',
    ]


def test_values_up_to_forty_characters_are_quoted() -> None:
    """A value of 40 characters is quoted; if it has 41, only its length is shown."""
    facts = {"type": "string", "max": 1}
    assert check_one(facts, "x" * 40)[0].endswith(f'not "{"x" * 40}".')
    assert check_one(facts, "x" * 41)[0].endswith("not a string of 41 characters.")


def test_twelve_options_are_listed() -> None:
    """If the list of allowed values is longer than twelve, it is cut and ends in `…`."""
    twelve, more = ({"type": "integer", "enum": [*range(length)]} for length in (12, 14))
    assert check_one(twelve, 99) == [
        'Parameter "p" must be one of 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, not 99.'
    ]
    assert check_one(more, 99) == [
        'Parameter "p" must be one of 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, …, not 99.'
    ]


def test_messages_hold_no_control_characters() -> None:
    """Line ends, escapes and lone surrogates are JSON escapes in messages; other scripts are not escaped."""
    message = check_one({"type": "boolean"}, "\x1b[31m\n\ud800")[0]
    assert message == r'Parameter "p" must be a boolean, not "\u001b[31m\n\ud800".'
    assert check_one({"type": "boolean"}, "да")[0].endswith('not "да".')


def test_number_of_problems_is_limited() -> None:
    """If very many keys are wrong, the answer is still readable."""
    schema = {"prompt": {"type": "string"}}
    assert len(check_input(schema, {f"k{n}": n for n in range(MAX_PROBLEMS)})) == MAX_PROBLEMS
    assert len(check_input(schema, {f"k{n}": n for n in range(10_000)})) == MAX_PROBLEMS


def test_deep_values_do_not_raise() -> None:
    """If a value is nested beyond the recursion limit, it is neither compared nor written."""
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    schema = {
        "a": {"type": "array", "default": deep},
        "b": {"type": "select", "enum": [deep]},
        "c": {"type": "select", "enum": ["x"]},
        "d": {"type": "string", "default": deep},
    }
    found = check_input(schema, {"a": deep, "b": deep, "c": deep, "d": deep, "e": deep})
    assert [problem.parameter for problem in found] == ["c", "d", "e"]


def sandbox_values(parameter: Parameter) -> st.SearchStrategy[Any]:
    """Generate values that are valid, nearly valid and invalid for a parameter."""
    bounds = [bound for bound in (parameter.minimum, parameter.maximum) if math.isfinite(bound)]
    edges = [bound + step for bound in bounds for step in (-1, 0, 1)]
    values: list[Any] = [None, True, False, "", "x", [], {}, parameter.default]
    values += [-1, 0, 1, 2.5, math.nan, math.inf]
    values += [kind(edge) for edge in edges for kind in (int, float, str)]
    for option in parameter.options:
        values += [option, [option], str(option)]
        values += [float(option)] if isinstance(option, int) else []
    texts = [int(edge) * "x" for edge in edges]
    return (
        st.sampled_from(values) | st.sampled_from(texts or ["y"]) | st.integers(-2, 15) | st.text(max_size=9)
    )


def sandbox_inputs(model: Model) -> st.SearchStrategy[dict[str, Any]]:
    """Generate inputs with any of the model's parameters, and sometimes an unknown key."""
    keys = {parameter.name: sandbox_values(parameter) for parameter in model.parameters}
    good = {p.name: st.just(p.options[0] if p.options else "x") for p in model.parameters if p.required}
    strange = st.sampled_from([{}] * 5 + [{"promt": "x"}, {"voice": "Kore"}, {"seed": 1}])
    return st.builds(
        lambda required, some, more: required | some | more,
        st.fixed_dictionaries({}, optional=good) | st.fixed_dictionaries(good),
        st.fixed_dictionaries({}, optional=keys),
        strange,
    )


def sandbox_accepts(model: Model, given_: dict[str, Any]) -> bool:
    """Ask the sandbox, which rejects null and 4.0 for an integer; we accept both."""
    plain = dict(given_)
    for parameter in model.parameters:
        value = plain.get(parameter.name)
        if value is None and not parameter.required:
            plain.pop(parameter.name, None)
        elif parameter.type == "integer" and isinstance(value, float) and value.is_integer():
            plain[parameter.name] = int(value)
    try:
        model.check(plain)
    except Problem:
        return False
    return not model.warnings(plain)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_agrees_with_the_sandbox(model: Model) -> None:
    """An input passes if and only if the sandbox accepts it without a warning."""
    schema = model.details()["input_schema"]
    seen = set()

    @given(sandbox_inputs(model))
    def agrees(given_: dict[str, Any]) -> None:
        accepted = sandbox_accepts(model, given_)
        seen.add(accepted)
        assert (check_input(schema, given_) == ()) is accepted

    agrees()
    assert seen == {True, False}


SHAPE_WORDS = ("parameters", "parameterGroups", "name", "value")
FACT_WORDS = ("type", "enum", "options", "default", "required", "min", "max", "minimum", "maximum")
LENGTH_WORDS = ("minLength", "maxLength", "minItems", "maxItems")
TYPE_WORDS = ("string", "integer", "number", "boolean", "array", "object", "select")
words = st.sampled_from((*SHAPE_WORDS, *FACT_WORDS, *LENGTH_WORDS, *TYPE_WORDS, "prompt", "seed"))
plain = (
    st.none() | st.booleans() | st.integers() | st.floats() | words | st.text(st.characters(), max_size=60)
)
json_values = st.recursive(
    plain | st.just(10**400),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(words | st.text(max_size=50), inner, max_size=5)
    ),
    max_leaves=20,
)
descriptions = st.dictionaries(words, json_values, max_size=6) | json_values
named = st.builds(
    lambda name, facts: {"name": name} | facts, words, st.dictionaries(words, json_values, max_size=6)
)
schemas = (
    json_values
    | st.dictionaries(words, descriptions, max_size=5)
    | st.fixed_dictionaries(
        {"parameters": st.lists(named | json_values, max_size=5)}, optional={"parameterGroups": json_values}
    )
)


@given(schemas, st.dictionaries(words | st.text(max_size=100), json_values, max_size=6))
@example({"p": {"type": "string", "min": math.inf}}, {"p": ""})
def test_never_raises(schema: object, given_: dict[str, Any]) -> None:
    """For any schema and input the result is a list of limited length, and the same each time."""
    found = check_input(schema, given_)
    assert found == check_input(schema, given_)
    assert len(found) <= MAX_PROBLEMS
    for problem in found:
        assert len(problem.message) < LONGEST_MESSAGE
        assert problem.message.isprintable()
        assert problem.message.startswith("Parameter ")
    missing = [" is required: " in problem.message for problem in found]
    assert missing == sorted(missing, reverse=True)
    if not isinstance(schema, Mapping):
        assert found == ()


@given(st.dictionaries(words, json_values, max_size=6), json_values)
def test_null_is_at_most_missing_and_a_value_never(facts: dict[str, Any], value: object) -> None:
    """For any description, null is reported only as missing, and a value never as missing."""
    problem_text = " is required: " if value is None else " must be "
    assert all(problem_text in problem.message for problem in check_input({"p": facts}, {"p": value}))
