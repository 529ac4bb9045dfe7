"""The sandbox's switches, their dice, and the page that lists them."""

import json
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from support.servers import free_port
from typer.testing import CliRunner

from receiver.cli import app
from receiver.errors import SettingsError
from receiver.sandbox.answers import CODES
from receiver.sandbox.options import Dice, SandboxOptions, switches

DOCS = Path(__file__).parents[2] / "docs" / "sandbox.md"


def test_defaults_never_misbehave() -> None:
    """By default no call fails, is late or is lost."""
    options = SandboxOptions()
    assert {name: value for name, value in asdict(options).items() if name.endswith("_rate") and value} == {}
    assert (options.latency, options.media_latency, options.refuse_submits, options.webhook_first) == (
        0,
        0,
        "",
        False,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fail_rate": 1.01}, "fail_rate must be from 0 to 1, not 1.01"),
        ({"fail_rate": -0.1}, "fail_rate must be from 0 to 1, not -0.1"),
        ({"latency": float("nan")}, "latency must be at least 0, not nan"),
        ({"latency": float("inf")}, "latency must be at least 0, not inf"),
        ({"webhook_attempts": 0}, "webhook_attempts must be from 1 to 20, not 0"),
        ({"rate_limit": 0}, "rate_limit must be at least 1, not 0"),
        ({"credits": 1.5}, "credits must be of type int, not float"),
        ({"credits": True}, "credits must be of type int, not bool"),
        ({"latency": True}, "latency must be of type float, not bool"),
        ({"latency": "1"}, "latency must be of type float, not str"),
        ({"webhook_first": 1}, "webhook_first must be of type bool, not int"),
        ({"refuse_submits": None}, "refuse_submits must be of type str, not NoneType"),
        ({"refuse_submits": "teapot"}, f"refuse_submits must be empty or one of: {', '.join(CODES)}"),
        ({"video_bytes": 65_535}, "video_bytes must be 0 or at least 65536"),
        ({"fail_rat": 1}, f"unknown switch 'fail_rat'; there are: {', '.join(switches())}"),
    ],
)
def test_invalid_value_is_an_error(changes: dict[str, Any], message: str) -> None:
    """A switch that is out of bounds, of another type or unknown is an error that names it."""
    with pytest.raises(SettingsError) as caught:
        SandboxOptions().changed(changes)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "changes",
    [
        {"fail_rate": 1},
        {"fail_rate": 0.5, "latency": 2},
        {"refuse_submits": "insufficient_scope"},
        {"video_bytes": 65_536},
        {"webhook_first": True},
        {},
    ],
)
def test_change_keeps_the_rest(changes: dict[str, Any]) -> None:
    """A change sets the given switches only, and the original is unchanged."""
    options = SandboxOptions(seed=7)
    assert asdict(options.changed(changes)) == asdict(SandboxOptions(seed=7)) | changes
    assert options == SandboxOptions(seed=7)


def test_dice_are_exact_at_the_ends() -> None:
    """A fault at rate 0 never strikes, and at rate 1 it always does."""
    dice = Dice(0)
    assert not any(dice.hit("fail_rate", 0) for _ in range(1000))
    assert all(dice.hit("fail_rate", 1.0) for _ in range(1000))


def test_dice_repeat_with_their_seed() -> None:
    """The same seed gives the same faults, another seed gives others, and 0.5 is about half."""
    first, same, other = ([dice.hit("x", 0.5) for _ in range(400)] for dice in (Dice(1), Dice(1), Dice(2)))
    assert first == same
    assert first != other
    assert 150 < sum(first) < 250


def test_one_switch_does_not_move_another() -> None:
    """The dice of one switch do not change the faults of another."""
    alone, together = Dice(1), Dice(1)
    expected = [alone.hit("fail_rate", 0.5) for _ in range(100)]
    got = []
    for _ in range(100):
        together.hit("error_rate", 0.5)
        got.append(together.hit("fail_rate", 0.5))
    assert got == expected
    assert [together.hit("latency", 0.5) for _ in range(100)] != expected, "their faults do not coincide"


def test_page_lists_every_switch_with_its_default() -> None:
    """The table in the documentation is the list of switches: flag, default and meaning."""
    rows = [line for line in DOCS.read_text().splitlines() if line.startswith("| `--")]
    defaults = asdict(SandboxOptions())
    expected = []
    for name, (_, switch) in switches().items():
        default = defaults[name] if isinstance(defaults[name], str) else json.dumps(defaults[name])
        expected.append(
            f"| `--{name.replace('_', '-')}` | {default}{' ' if default else ''}| {switch.help} |"
        )
    assert rows == expected


@pytest.mark.parametrize(
    ("arguments", "limits"),
    [
        ([], (120, 10)),
        (["--like-clipia"], (120, 10)),
        (["--rate-limit", "6000"], (6000, 10)),
        (["--no-like-clipia"], (1_000_000, 1_000_000)),
        (["--no-like-clipia", "--rate-limit", "120"], (120, 1_000_000)),
    ],
)
def test_limits_on_the_command_line(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], limits: tuple[int, int]
) -> None:
    """`receiver sandbox` has Clipia's limits; `--no-like-clipia` removes those that are not given."""
    made: list[SandboxOptions] = []

    def note(options: SandboxOptions, **_: Any) -> None:
        made.append(options)
        raise SettingsError("far enough")

    monkeypatch.setattr(import_module("receiver.cli.sandbox"), "create_app", note)
    CliRunner().invoke(app, ["sandbox", "--port", str(free_port()), *arguments])
    assert [(options.rate_limit, options.concurrency_limit) for options in made] == [limits]
