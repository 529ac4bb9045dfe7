"""Write the tables of `docs/configuration.md`: `python tests/support/configuration_reference.py`.

With `--check` the page is left alone, and the exit status is 1 if it is out of date.
"""

import ast
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Final, Literal, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from receiver import destination_settings, setting_fields, source_settings
from receiver.config_file import variable_name
from receiver.destination_settings import DestinationSettings, FilterSettings, RetrySettings, TlsSettings
from receiver.setting_fields import ApiToken, SettingFields
from receiver.source_settings import SourceSettings

PAGE: Final = Path(__file__).parents[2] / "docs" / "configuration.md"
MODELS: Final[Mapping[str, type[BaseModel]]] = {
    each.__name__: each
    for each in (
        SettingFields,
        DestinationSettings,
        RetrySettings,
        FilterSettings,
        TlsSettings,
        SourceSettings,
    )
}
_MODULES: Final = (destination_settings, setting_fields, source_settings)
_TABLES: Final = frozenset({"destinations", "sources"})
"""Settings that are tables of the file; each has a section of its own."""
_MARK: Final = re.compile(r"(<!-- fields of (\w+) -->\n)(?:\n?\|[^\n]*\n)*")
_PAGE: Final = re.compile(r"docs/([\w-]+\.md)((?:#[\w-]+)?)")
_BOUNDS: Final = {"ge": "from {}", "gt": "more than {}", "le": "to {}"}


def render(page: str) -> str:
    """Return the page with the present tables; all other lines stay."""
    return _MARK.sub(lambda mark: f"{mark[1]}\n{table(MODELS[mark[2]])}", page)


def table(model: type[BaseModel]) -> str:
    """Return the table of a model's fields."""
    rows = _setting_rows(model) if model is SettingFields else _key_rows(model)
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def meanings(model: type[BaseModel]) -> Mapping[str, str]:
    """Return the docstrings of a model's fields."""
    (body,) = (
        node.body
        for module in _MODULES
        for node in ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name == model.__name__
    )
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def _setting_rows(model: type[BaseModel]) -> Iterator[tuple[str, ...]]:
    yield "Variable", "Key in the file", "Value", "Default", "Meaning"
    yield ("---",) * 5
    for name, value, default, meaning in _fields(model):
        if name not in _TABLES:
            yield f"`{variable_name(name)}`", f"`{name}`", value, default, meaning


def _key_rows(model: type[BaseModel]) -> Iterator[tuple[str, ...]]:
    yield "Key", "Value", "Default", "Meaning"
    yield ("---",) * 4
    for name, value, default, meaning in _fields(model):
        yield f"`{name}`", value, default, meaning


def _fields(model: type[BaseModel]) -> Iterator[tuple[str, str, str, str]]:
    texts = meanings(model)
    for name, field in model.model_fields.items():
        bounds = [
            text.format(_number(limit))
            for attribute, text in _BOUNDS.items()
            for limit in (getattr(each, attribute, None) for each in field.metadata)
            if limit is not None
        ]
        value = " ".join([_value(field.annotation), *bounds])
        meaning = _PAGE.sub(r"[\1](\1\2)", texts.get(name, ""))
        yield name, value, _default(field), meaning.replace("|", "\\|")


def _value(annotation: Any) -> str:
    """Return the shape of a setting's value in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    shapes: Mapping[Any, Callable[[], str]] = {
        Literal: lambda: ", ".join(f"`{each}`" for each in arguments),
        Union: lambda: _choice(arguments),
        UnionType: lambda: _choice(arguments),
        tuple: lambda: f"list: {_value(arguments[0])}",
        dict: lambda: f"for each name: {_value(arguments[1])}",
    }
    if origin in shapes:
        return shapes[origin]()
    if hasattr(annotation, "__metadata__"):
        return _value(arguments[0])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "text" if annotation is ApiToken else "table, below"
    words = {int: "whole number", float: "number", bool: "`true`, `false`", SecretStr: "text", str: "text"}
    return words[annotation]


def _choice(arguments: Sequence[Any]) -> str:
    kinds = [each for each in arguments if each is not NoneType]
    # Any whole number is a number, too.
    return ", ".join(_value(each) for each in kinds if each is not int or float not in kinds)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value in (None, (), {}, FilterSettings()):
        return "none"
    if isinstance(value, BaseModel):
        return "below"
    text = value.get_secret_value() if isinstance(value, SecretStr) else value
    if isinstance(text, tuple):
        return ", ".join(f"`{each}`" for each in text)
    if isinstance(text, bool):
        return f"`{str(text).lower()}`"
    return f"`{_number(text) if isinstance(text, int | float) else text}`"


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)


def main() -> int:
    """Check or rewrite the page; return the exit status."""
    page = PAGE.read_text(encoding="utf-8")
    current = render(page)
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(current, encoding="utf-8")
        return 0
    if current != page:
        sys.stderr.write("out of date: run python tests/support/configuration_reference.py\n")
    return current != page


if __name__ == "__main__":
    sys.exit(main())
