"""The settings in force, as they are shown: never a part of a secret."""

from pathlib import Path

import pytest
from support.echoing import assert_hidden

from receiver.destinations import _KINDS
from receiver.media.storage import _CLOUDS
from receiver.settings import Settings
from receiver.settings_report import report, shown_url

CANARY = "cAnArY8f3b61d2e9b7c4"
URLS = {
    "postgresql://user:{}@db:5432/name?sslmode=require": "postgresql://[masked]@db:5432/name?…",
    "postgresql://db/name?password={}": "postgresql://db/name?…",
    "postgresql://db/name?password={}@{}": "postgresql:[masked]",
    "postgresql://user:a?{}@db/name": "postgresql:[masked]",
    "redis://:{}/x@cache:6379/0?stream=s": "redis://[masked]@cache:6379/0?…",
    "nats://{}@nats:4222?subject=s.x": "nats://[masked]@nats:4222?…",
    "nats://a:{}@n1:4222,nats://b:{}@n2:4222": "nats://[masked]@n1:4222, nats://[masked]@n2:4222",
    "nats://a:{}@n1:4222,b:{}@n2:4222": "nats://[masked]@n2:4222",
    "https://hooks.example.com/services/{}": "https://hooks.example.com/…",
    "https://user:{}@hooks.example.com/in?key={}#{}": "https://[masked]@hooks.example.com/…?…",
    "https://hooks.example.com/": "https://hooks.example.com/",
    "amqp://user:{}@mq/vhost?queue=q": "amqp://[masked]@mq/vhost?…",
    "s3://bucket/prefix?endpoint=http://user:{}@host": "s3:[masked]",
    "sqlite:///data/receiver.db": "sqlite:///data/receiver.db",
    "file:data/a@b/media": "file:data/a@b/media",
    "{}": "[masked]",
    "{}://host": "[masked]",
    "user:{}@host": "[masked]",
    "http:{}": "http:[masked]",
    "postgresql://user:{}": "postgresql:[masked]",
    "postgresql://user:{}/name": "postgresql:[masked]",
    "redis://cache:6379;{}?stream=s": "redis:[masked]",
    "postgresql://[::1]:5432,db-2:5433/name": "postgresql://[::1]:5432,db-2:5433/name",
}


@pytest.mark.parametrize("url", URLS)
def test_urls_are_shown_without_secrets(url: str) -> None:
    """G8: a URL is shown without user, password, query and a web hook's path, registered or not."""
    shown = shown_url(url.replace("{}", CANARY))
    assert shown == URLS[url]
    assert_hidden(shown, CANARY)


def test_the_origin_of_each_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value comes from the environment, the file or the default; tables have lists of their own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "receiver.toml").write_text(
        f'poll_after = 30\n[[destinations]]\nname = "orders"\nurl = "https://o.example/{CANARY}"\n'
        f'headers = {{ X-Team = "{CANARY}" }}\n[[sources]]\nname = "shop"\nsecret = "whsec_{CANARY}"\n'
    )
    monkeypatch.setenv("CLIPIA_KEY", f"clipia_test_{CANARY}")
    monkeypatch.setenv("RECEIVER_API_TOKENS", f"ops:{CANARY}:read+operate")
    monkeypatch.setenv("RECEIVER_BUDGETS", "shop:500")
    found = report(Settings.load(), {"CLIPIA_KEY": "x", "RECEIVER_BUDGETS": "x"})
    assert_hidden(str(found), CANARY)
    settings = {each["name"]: (each["value"], each["origin"]) for each in found["settings"]}
    assert settings["CLIPIA_KEY"] == ("clipia_test_[masked]", "environment")
    assert settings["RECEIVER_BUDGETS"] == ("shop:500", "environment")
    assert settings["RECEIVER_POLL_AFTER"] == ("30.0", "file")
    assert settings["RECEIVER_KEEP_ALIVE"] == ("75", "default")
    assert settings["RECEIVER_PUBLIC_URL"] == (None, "default")
    assert found["tokens"] == [{"name": "ops", "scopes": ["operate", "read"]}]
    (destination,) = found["destinations"]
    assert (destination["url"], destination["options"]) == ("https://o.example/…", "headers X-Team")
    (source,) = found["sources"]
    assert (source["name"], len(source["secret_ids"])) == ("shop", 1)


def test_each_scheme_is_known() -> None:
    """The scheme of each destination and storage is shown."""
    for scheme in (*_KINDS, *_CLOUDS):
        assert shown_url(f"{scheme}://host/place").startswith(f"{scheme}:"), scheme


def test_each_setting_is_shown() -> None:
    """No setting is left out, but the tables, which have lists of their own."""
    shown = {each["name"] for each in report(Settings(), {})["settings"]}
    assert len(shown) == len(Settings.model_fields) - 3
