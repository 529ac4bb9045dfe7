"""Filters: the events that match, and the reason if an event does not."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from receiver.core.routing import RoutingFacts, filter_text, mismatch
from receiver.destination_settings import FilterSettings
from receiver.errors import SettingsError
from receiver.settings import Settings

WORDS = ("a", "b", "seedance-2", "seedance-pro")


def facts(**changes: Any) -> RoutingFacts:
    """Return the facts of a result of our own job."""
    values: dict[str, Any] = {
        "status": "OK",
        "model": "seedance-2",
        "source": "clipia",
        "caller": "shop",
        "metadata": {"order": "7", "tier": "gold"},
    }
    return RoutingFacts(**(values | changes))


STRANGER: dict[str, Any] = {"caller": None, "metadata": {}}
"""The facts of an event if its job is not ours."""


@pytest.mark.parametrize(
    ("wanted", "changes"),
    [
        ({}, {}),
        ({}, {"status": "ERROR", "model": None, **STRANGER}),
        ({"status": "OK"}, {}),
        ({"status": ["ERROR", "OK"]}, {}),
        ({"source": "clipia"}, {}),
        ({"source": ["staging", "clipia"]}, {}),
        ({"caller": "shop"}, {}),
        ({"caller": ["blog", "shop"]}, {}),
        ({"model": "seedance-2"}, {}),
        ({"model": "seedance-*"}, {}),
        ({"model": "seedance-?"}, {}),
        ({"model": "seedance-[12]"}, {}),
        ({"model": ["nano-*", "*dance*"]}, {}),
        ({"model": "*"}, {"model": None}),
        ({"metadata": {"order": "7"}}, {}),
        ({"metadata": {"order": ["6", "7"], "tier": "gold"}}, {}),
        ({"status": "OK", "model": "seed*", "source": "clipia", "caller": "shop"}, {}),
    ],
)
def test_matching_events(wanted: dict[str, Any], changes: dict[str, Any]) -> None:
    """One value or a list, globs for models; if a line is absent, all events match."""
    assert mismatch(FilterSettings(**wanted), facts(**changes)) is None


@pytest.mark.parametrize(
    ("wanted", "changes", "said"),
    [
        ({"status": "ERROR"}, {}, "status is 'OK', the filter allows 'ERROR'"),
        ({"source": ["a", "b"]}, {}, "source is 'clipia', the filter allows 'a' or 'b'"),
        ({"caller": "blog"}, {}, "caller is 'shop', the filter allows 'blog'"),
        ({"caller": "shop"}, STRANGER, "caller is absent, the filter allows 'shop'"),
        ({"model": "nano-*"}, {}, "model is 'seedance-2', the filter allows 'nano-*'"),
        ({"model": "seedance"}, {}, "model is 'seedance-2', the filter allows 'seedance'"),
        ({"model": "Seedance-*"}, {}, "model is 'seedance-2', the filter allows 'Seedance-*'"),
        ({"model": "seedance-*"}, {"model": None}, "model is absent, the filter allows 'seedance-*'"),
        ({"metadata": {"tier": "gold"}}, STRANGER, "metadata.tier is absent, the filter allows 'gold'"),
        (
            {"metadata": {"tier": ["iron", "tin"]}},
            {},
            "metadata.tier is 'gold', the filter allows 'iron' or 'tin'",
        ),
        ({"metadata": {"order": "7", "absent": "x"}}, {}, "metadata.absent is absent, the filter allows 'x'"),
    ],
)
def test_mismatches_have_a_reason(wanted: dict[str, Any], changes: dict[str, Any], said: str) -> None:
    """If one line does not match, the event does not, and the reason has both values."""
    assert mismatch(FilterSettings(**wanted), facts(**changes)) == said
    others = {"status": ["OK", "ERROR"], "model": "*", "source": "clipia"}
    assert mismatch(FilterSettings(**(others | wanted)), facts(**changes)) == said


@given(
    wanted=st.fixed_dictionaries(
        {},
        optional={
            "status": st.sampled_from(["OK", "ERROR"]),
            "model": st.lists(st.sampled_from([*WORDS, "seed*", "?"]), min_size=1),
            "source": st.lists(st.sampled_from(WORDS), min_size=1),
            "caller": st.sampled_from(WORDS),
            "metadata": st.dictionaries(st.sampled_from("kl"), st.sampled_from(WORDS)),
        },
    ),
    status=st.sampled_from(["OK", "ERROR"]),
    model=st.none() | st.sampled_from(WORDS),
    source=st.sampled_from(WORDS),
    caller=st.none() | st.sampled_from(WORDS),
    metadata=st.dictionaries(st.sampled_from("kl"), st.sampled_from(WORDS)),
)
def test_a_filter_is_all_its_lines(wanted: dict[str, Any], **changes: Any) -> None:
    """An event matches all lines together if and only if it matches each of them."""
    alone = [mismatch(FilterSettings(**{name: value}), facts(**changes)) for name, value in wanted.items()]
    together = mismatch(FilterSettings(**wanted), facts(**changes))
    assert (together is None) == (not any(alone))
    assert together is None or together in alone


@pytest.mark.parametrize(
    ("wanted", "needs"),
    [
        ({}, False),
        ({"status": "OK", "model": "*", "source": "clipia"}, False),
        ({"caller": "shop"}, True),
        ({"metadata": {"tier": "gold"}}, True),
    ],
)
def test_only_callers_and_metadata_need_the_job(wanted: dict[str, Any], *, needs: bool) -> None:
    """If no filter needs an event's job, the query for it is skipped."""
    assert FilterSettings(**wanted).needs_job is needs


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({}, ""),
        ({"status": "OK"}, "status OK"),
        (
            {"model": ["seedance-*", "nano-*"], "metadata": {"tier": "gold"}, "caller": "shop"},
            "model seedance-* or nano-*, caller shop, metadata.tier gold",
        ),
    ],
)
def test_a_filter_is_put_in_words(wanted: dict[str, Any], said: str) -> None:
    """The text of `receiver check` about a destination."""
    assert filter_text(FilterSettings(**wanted)) == said


def write_filter(content: str) -> None:
    """Write a receiver.toml with one destination and its filter."""
    head = '[[destinations]]\nname = "jobs"\nurl = "file:jobs.jsonl"\n'
    Path("receiver.toml").write_text(head + content, encoding="utf-8")


def test_a_filter_is_read_from_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line has one value or a list, `${NAME}` is replaced, and without a filter all events match."""
    monkeypatch.setenv("CUSTOMER", "shop")
    write_filter(
        '[destinations.filter]\nstatus = "OK"\nmodel = ["seedance-*", "nano-banana-2"]\n'
        'caller = "${CUSTOMER}"\nmetadata = { tier = ["gold", "iron"], region = "eu" }\n'
        '[[destinations]]\nname = "all"\nurl = "file:all.jsonl"\n'
    )
    jobs, everything = Settings.load().all_destinations
    assert jobs.filter == FilterSettings(
        status=("OK",),
        model=("seedance-*", "nano-banana-2"),
        caller=("shop",),
        metadata={"tier": ("gold", "iron"), "region": ("eu",)},
    )
    assert everything.filter == FilterSettings()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('filter = { status = "ok" }', r"destinations\.0\.filter\.status"),
        ('filter = { status = ["OK", "FAILED"] }', r"destinations\.0\.filter\.status\.1"),
        ("filter = { model = 2 }", r"destinations\.0\.filter\.model"),
        ("filter = { source = [1] }", r"destinations\.0\.filter\.source\.0"),
        ("filter = { caller = true }", r"destinations\.0\.filter\.caller"),
        ("filter = { metadata = { order = 7 } }", r"destinations\.0\.filter\.metadata\.order"),
        ('filter = { metadata = "tier" }', r"destinations\.0\.filter\.metadata"),
        ('filter = { modle = "x" }', r"destinations\.0\.filter\.modle: is not a setting"),
        ('filter = "status = OK"', r"destinations\.0\.filter"),
        ('filter = { caller = "${ABSENT_CALLER}" }', "ABSENT_CALLER"),
    ],
)
def test_mistakes_in_a_filter_are_named(content: str, said: str) -> None:
    """If a filter is invalid, the start fails; otherwise it could match too much or too little."""
    write_filter(content)
    with pytest.raises(SettingsError, match=said):
        Settings.load()
