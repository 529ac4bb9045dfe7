"""Settings: their sources, and the errors for invalid ones."""

from pathlib import Path
from typing import Any

import pytest

from receiver.errors import SettingsError
from receiver.settings import Settings, unknown_variables

TOKEN = "0123456789abcdef0123456789abcdef"


def write_config(content: str) -> None:
    """Write receiver.toml into the working directory."""
    Path("receiver.toml").write_text(content, encoding="utf-8")


def test_defaults_need_no_configuration() -> None:
    """On a laptop only the secret must be set."""
    settings = Settings.load()
    assert settings.database_url.get_secret_value() == "sqlite:///data/receiver.db"
    assert settings.storage_url.get_secret_value() == "file:data/media"
    assert settings.signature_tolerance == 300
    assert settings.max_body_bytes == 262_144
    assert settings.media_hosts == ("media.clipia.ai",)
    assert settings.all_destinations == ()


def test_starting_without_a_secret_names_the_variable() -> None:
    """A1: without a secret the error names the variable."""
    with pytest.raises(SettingsError, match="CLIPIA_WEBHOOK_SECRET"):
        Settings.load().require_sources()


@pytest.mark.parametrize("value", [",", " , ", " "])
def test_an_empty_secret_is_an_error(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """A1: an empty secret is an error, because anyone could sign with it."""
    monkeypatch.setenv("CLIPIA_WEBHOOK_SECRET", value)
    with pytest.raises(SettingsError, match="empty"):
        Settings.load().require_sources()


def test_several_secrets_are_kept_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A12: during a rotation there are several secrets."""
    monkeypatch.setenv("CLIPIA_WEBHOOK_SECRET", "new-secret, old-secret")
    (source,) = Settings.load().require_sources()
    assert (source.name, source.secrets) == ("clipia", ("new-secret", "old-secret"))


def test_retired_secrets_belong_to_their_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """G14: earlier secrets are apart from those that are accepted, in a variable or in the file."""
    monkeypatch.setenv("CLIPIA_WEBHOOK_SECRET", "new-secret")
    write_config(
        '[[sources]]\nname = "clipia"\nsecret = "file"\nretired_secret = "of-file"\n'
        '[[sources]]\nname = "staging"\nsecret = "now"\nretired_secret = "before, long-before"\n'
    )

    def found() -> dict[str, tuple[str, ...]]:
        return {
            each.name: (*each.secrets, "|", *each.retired_secrets) for each in Settings.load().all_sources
        }

    staging = ("now", "|", "before", "long-before")
    assert found() == {"clipia": ("new-secret", "|", "of-file"), "staging": staging}
    monkeypatch.setenv("CLIPIA_RETIRED_WEBHOOK_SECRET", "old-secret, older-secret")
    assert found() == {"clipia": ("new-secret", "|", "old-secret", "older-secret"), "staging": staging}


@pytest.mark.parametrize("value", ["-1", "10001", "x"])
def test_the_number_of_kept_rejections_has_bounds(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """G11: RECEIVER_REJECTIONS_KEPT is from 0 to 10000."""
    monkeypatch.setenv("RECEIVER_REJECTIONS_KEPT", value)
    with pytest.raises(SettingsError, match="RECEIVER_REJECTIONS_KEPT"):
        Settings.load()


@pytest.mark.parametrize("value", ["0", "29", "901", "-300", "x", "1e9"])
def test_tolerance_has_bounds(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """A6: a tolerance that would almost switch the check off is an error at start."""
    monkeypatch.setenv("RECEIVER_SIGNATURE_TOLERANCE", value)
    with pytest.raises(SettingsError, match="RECEIVER_SIGNATURE_TOLERANCE"):
        Settings.load()


def test_environment_wins_over_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings come from the environment first, then from receiver.toml."""
    write_config('database_url = "sqlite:///file.db"\nstorage_url = "file:from-file"\n')
    monkeypatch.setenv("RECEIVER_DATABASE_URL", "sqlite:///environment.db")
    settings = Settings.load()
    assert settings.database_url.get_secret_value() == "sqlite:///environment.db"
    assert settings.storage_url.get_secret_value() == "file:from-file"


def test_destinations_come_from_tables_and_from_one_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Destinations are [[destinations]] tables, and RECEIVER_DESTINATION_URL is one more."""
    write_config(
        '[[destinations]]\nname = "jobs"\nurl = "file:a.jsonl"\nwhen = "received"\nretry = { cap = 60 }\n'
    )
    monkeypatch.setenv("RECEIVER_DESTINATION_URL", "file:b.jsonl")
    jobs, default = Settings.load().all_destinations
    assert (jobs.name, jobs.when, jobs.retry.cap, jobs.retry.give_up_after) == (
        "jobs",
        "received",
        60,
        259_200,
    )
    assert (default.name, default.url.get_secret_value(), default.when) == (
        "default",
        "file:b.jsonl",
        "media_stored",
    )


def test_secrets_in_the_file_are_taken_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """`${NAME}` keeps secrets out of receiver.toml; the error names a missing variable."""
    write_config('[[sources]]\nname = "staging"\nsecret = "${STAGING_SECRET}"\n')
    with pytest.raises(SettingsError, match="STAGING_SECRET"):
        Settings.load()
    monkeypatch.setenv("STAGING_SECRET", "from-environment")
    (source,) = Settings.load().require_sources()
    assert source.secrets == ("from-environment",)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("databse_url = 'x'", "databse_url: is not a setting"),
        ("[[destinations]]\nname = 'A b'\nurl = 'file:x'", "destinations.0.name"),
        ("[[destinations]]\nname = 'a'", "destinations.0.url"),
        ("[[destinations]]\nname = 'a'\nurl = 'file:x'\nwehn = 'received'", "destinations.0.wehn"),
        ("[[destinations]]\nname = 'a'\nurl = 'file:x'\n" * 2, "more than once: a"),
        ("[[sources]]\nname = 'a'\nsecret = 'x'\n" * 2, "more than once: a"),
        ("= broken", "cannot be read"),
    ],
)
def test_mistakes_in_the_file_are_named(content: str, said: str) -> None:
    """An error about the file names the place."""
    write_config(content)
    with pytest.raises(SettingsError, match=said):
        Settings.load()


def test_a_named_file_must_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """If RECEIVER_CONFIG names a missing file, that is an error, and the defaults are not used."""
    monkeypatch.setenv("RECEIVER_CONFIG", "absent.toml")
    with pytest.raises(SettingsError, match=r"absent\.toml"):
        Settings.load()


def test_secrets_show_in_neither_repr_nor_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """G8: no secret reaches a log through a repr or an error message."""
    canary = "canary-4242424242424242"
    monkeypatch.setenv("CLIPIA_KEY", f"clipia_live_{canary}")
    monkeypatch.setenv("CLIPIA_WEBHOOK_SECRET", canary)
    monkeypatch.setenv("RECEIVER_DATABASE_URL", f"postgresql://user:{canary}@db/x")
    monkeypatch.setenv("RECEIVER_API_TOKENS", f"ops:{canary}")
    monkeypatch.setenv("RECEIVER_DESTINATION_URL", f"https://user:{canary}@example.com")
    settings = Settings.load()
    assert canary not in repr(settings)
    assert canary not in repr(settings.all_sources) + repr(settings.all_destinations)
    monkeypatch.setenv("RECEIVER_API_TOKENS", "ops:canary-42")
    with pytest.raises(SettingsError, match=r"RECEIVER_API_TOKENS: entry 1") as caught:
        Settings.load()
    assert "canary-42" not in str(caught.value)


def test_tokens_have_names_and_scopes(monkeypatch: pytest.MonkeyPatch) -> None:
    """G1: name:token[:scope+scope]; a token without scopes has all of them."""
    monkeypatch.setenv(
        "RECEIVER_API_TOKENS", f"grafana:{TOKEN}:read, ops:{TOKEN}x:read+operate, all:{TOKEN}y"
    )
    tokens = {token.name: token.scopes for token in Settings.load().api_tokens}
    assert tokens == {"grafana": {"read"}, "ops": {"read", "operate"}, "all": {"submit", "read", "operate"}}


@pytest.mark.parametrize("value", [f"a:{TOKEN}:write", f"a:{TOKEN},a:{TOKEN}x", f":{TOKEN}", "a"])
def test_invalid_tokens_are_errors(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """G1: unknown scopes, and doubled or missing names, are errors at start."""
    monkeypatch.setenv("RECEIVER_API_TOKENS", value)
    with pytest.raises(SettingsError):
        Settings.load()


@pytest.mark.parametrize(
    ("key", "environment", "allowed"),
    [
        ("clipia_test_x", "live", False),
        ("clipia_live_x", "test", False),
        ("clipia_test_x", "test", True),
        ("clipia_live_x", "live", True),
    ],
)
def test_sandbox_and_live_do_not_mix(
    monkeypatch: pytest.MonkeyPatch, key: str, environment: str, *, allowed: bool
) -> None:
    """A17: a sandbox key is an error if the source is declared live."""
    write_config(f'[[sources]]\nname = "clipia"\nsecret = "s"\nenvironment = "{environment}"\n')
    monkeypatch.setenv("CLIPIA_KEY", key)
    if allowed:
        Settings.load()
        return
    with pytest.raises(SettingsError, match="must not mix"):
        Settings.load()


def test_the_variable_replaces_the_secret_of_the_default_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """CLIPIA_WEBHOOK_SECRET and a table of the same source are one source, and the variable wins."""
    write_config('[[sources]]\nname = "clipia"\nsecret = "file"\nenvironment = "live"\n')
    monkeypatch.setenv("CLIPIA_WEBHOOK_SECRET", "variable")
    (source,) = Settings.load().require_sources()
    assert (source.secrets, source.environment) == (("variable",), "live")


def test_unknown_variables_are_found() -> None:
    """A misspelled variable is reported, not ignored."""
    names = {"RECEIVER_DATABSE_URL": "x", "RECEIVER_DATABASE_URL": "x", "RECEIVER_CONFIG": "x", "PATH": "x"}
    assert unknown_variables(names) == {"RECEIVER_DATABSE_URL": "RECEIVER_DATABASE_URL"}
    assert unknown_variables({"RECEIVER_XYZ": ""}) == {"RECEIVER_XYZ": None}


def test_the_budget_of_memory_has_room_for_large_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A10: if the memory budget is too small for the largest body, the error names both settings."""
    monkeypatch.setenv("RECEIVER_MAX_BODY_BYTES", str(4 * 2**20))
    monkeypatch.setenv("RECEIVER_MAX_BUFFERED_BYTES", str(16 * 2**20))
    Settings.load()
    monkeypatch.setenv("RECEIVER_MAX_BUFFERED_BYTES", str(16 * 2**20 - 1))
    with pytest.raises(SettingsError, match=r"RECEIVER_MAX_BUFFERED_BYTES .* RECEIVER_MAX_BODY_BYTES"):
        Settings.load()


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("shop:12.5,*:100", {"shop": 12.5, "*": 100}),
        ("shop:12.0", {"shop": 12}),
        ("shop:0", {"shop": 0}),
        ({"shop": 12.5, "other": 3.0}, {"shop": 12.5, "other": 3}),
    ],
)
def test_budgets_have_fractions(given: Any, read: dict[str, float]) -> None:
    """F12: a budget is a number of credits, which may have a fraction."""
    assert repr(Settings.load(budgets=given).budgets) == repr(read)


@pytest.mark.parametrize(
    "given",
    ["shop", "shop:", ":1", "shop:-1", "shop:1e3", "shop:.5", "shop:nan", "shop:1,5", "shop:" + "9" * 13]
    + [{"shop": value} for value in (-0.5, float("nan"), float("inf"), 10**13, "x")],
    ids=repr,
)
def test_an_invalid_budget_is_an_error(given: Any) -> None:
    """F12: a budget that is no number of credits from 0 up is an error that names the setting."""
    with pytest.raises(SettingsError, match=r"(?i)budgets"):
        Settings.load(budgets=given)


@pytest.mark.parametrize(
    ("name", "value", "advice"),
    [
        ("RECEIVER_KEEP_ALIVE", "1.5", "write a whole number"),
        ("RECEIVER_KEEP_ALIVE", "0", "write 1 or more"),
        ("RECEIVER_KEEP_ALIVE", "3601", "write 3600 or less"),
        ("RECEIVER_POLL_AFTER", "soon", "write a number"),
        ("RECEIVER_LOG_LEVEL", "LOUD", "write 'DEBUG', 'INFO', 'WARNING' or 'ERROR'"),
    ],
)
def test_a_wrong_value_is_answered_with_advice(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, advice: str
) -> None:
    """The error says what to write, in our words."""
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        Settings.load()
    assert str(caught.value) == f"invalid settings:\n  {name}: {advice}"
