"""Settings as text: white space, quotes, control characters, and errors that never show a value."""

import os
from pathlib import Path

import pytest

from receiver.config_file import strip_cloud_variables
from receiver.errors import SettingsError
from receiver.masking import MASK, mask
from receiver.media import MediaHosts
from receiver.settings import Settings

CANARY = "cAnArY8f3b61d2e9"
TOKEN = "0123456789abcdef0123456789abcdef"

VARIABLES = {
    "CLIPIA_KEY": f"clipia_live_{CANARY}",
    "CLIPIA_WEBHOOK_SECRET": f"whsec_{CANARY}",
    "CLIPIA_BASE_URL": "https://api.example.com",
    "RECEIVER_DATABASE_URL": f"postgresql://user:{CANARY}@db/name",
    "RECEIVER_STORAGE_URL": "s3://bucket/prefix",
    "RECEIVER_PUBLIC_URL": "https://hooks.example.com",
    "RECEIVER_API_TOKENS": f"ops:{CANARY}{CANARY}",
    "RECEIVER_MEDIA_HOSTS": "media.example.com",
    "RECEIVER_DESTINATION_URL": f"https://user:{CANARY}@hooks.example.com/in",
    "RECEIVER_BUDGETS": "ops:12",
    "RECEIVER_LOG_LEVEL": "INFO",
    "RECEIVER_POLL_AFTER": "60",
    "RECEIVER_REFUSED_GIVE_UP_AFTER": "3600",
    "RECEIVER_INPUT_CHECK": "strict",
    "RECEIVER_SIGNATURE_TOLERANCE": "300",
    "RECEIVER_MAX_BODY_BYTES": "262144",
    "RECEIVER_MAX_BUFFERED_BYTES": "67108864",
}


def write_config(content: str | bytes) -> None:
    """Write receiver.toml into the working directory."""
    Path("receiver.toml").write_bytes(content.encode() if isinstance(content, str) else content)


def plain(settings: Settings) -> dict[str, object]:
    """Return the settings with their secrets."""
    shown = settings.model_dump(mode="python")
    secrets = ("clipia_key", "clipia_webhook_secret", "database_url", "storage_url", "destination_url")
    values = {name: getattr(settings, name).get_secret_value() for name in secrets}
    tokens = [(token.name, token.token.get_secret_value()) for token in settings.api_tokens]
    return shown | values | {"api_tokens": tokens}


@pytest.mark.parametrize("around", ["{}\n", " {}", "{}\r\n", "\t{}\n\n", "\ufeff{}", "{}\u00a0", "{}\u2028"])
def test_white_space_around_a_variable_is_no_part_of_it(monkeypatch: pytest.MonkeyPatch, around: str) -> None:
    """White space around a variable is removed: `echo` ends a secret with a line feed."""
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    expected = plain(Settings.load())
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, around.format(value))
    assert plain(Settings.load()) == expected


def test_white_space_in_the_file_and_in_what_it_refers_to_is_no_part_of_a_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """White space is removed from the values of receiver.toml, and from the variables in its `${}`."""
    monkeypatch.setenv("PASSWORD", f"{CANARY}\n")
    monkeypatch.setenv("SECRET", f" whsec_{CANARY}\n")
    write_config(
        'public_url = " https://hooks.example.com\\n"\nlog_level = "DEBUG\\n"\n'
        '[[destinations]]\nname = "jobs\\n"\nurl = "amqp://user:${PASSWORD}@host/?queue=jobs"\n'
        '[[sources]]\nname = "staging"\nsecret = "${SECRET}"\n'
    )
    settings = Settings.load()
    assert (settings.public_url, settings.log_level) == ("https://hooks.example.com", "DEBUG")
    (destination,) = settings.all_destinations
    assert destination.name == "jobs"
    assert destination.url.get_secret_value() == f"amqp://user:{CANARY}@host/?queue=jobs"
    (source,) = settings.all_sources
    assert source.secrets == (f"whsec_{CANARY}",)


def test_entries_of_a_list_may_stand_in_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """White space around the entries of a list is removed: a YAML block has one entry per line."""
    monkeypatch.setenv("RECEIVER_API_TOKENS", f"a:{TOKEN},\n  b:{TOKEN}x:read,\n")
    monkeypatch.setenv("CLIPIA_WEBHOOK_SECRET", "whsec_new,\nwhsec_old\n")
    monkeypatch.setenv("RECEIVER_MEDIA_HOSTS", "a.example,\n\tb.example\n")
    settings = Settings.load()
    assert [token.name for token in settings.api_tokens] == ["a", "b"]
    assert settings.require_sources()[0].secrets == ("whsec_new", "whsec_old")
    assert settings.media_hosts == ("a.example", "b.example")


@pytest.mark.parametrize("inside", ["\n", "\r\n", "\t", "\x1b", "\x7f", "\u2028", "\ufeff", "\udc80"])
@pytest.mark.parametrize("name", VARIABLES)
def test_a_control_character_inside_is_an_error_that_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, inside: str
) -> None:
    """A control character in a value is an error with the variable's name and without its value."""
    value = VARIABLES[name]
    monkeypatch.setenv(name, value[: len(value) // 2] + inside + value[len(value) // 2 :])
    with pytest.raises(SettingsError, match=name) as caught:
        Settings.load()
    assert_hidden(str(caught.value))
    assert value[-8:] not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ('database_url = "sqlite:///a\\nb"', "database_url"),
        ('[[destinations]]\nname = "a"\nurl = "amqp://u:cAnArY8f\\n3b61d2e9@h"', "destinations.0.url"),
        ('[[sources]]\nname = "a"\nsecret = "whsec_cAnArY8f\\u00003b61d2e9"', "sources.0.secret"),
        (f'[[sources]]\nname = "a"\nsecret = "\'{CANARY}\'"', "sources.0.secret"),
        (f'[[sources]]\nname = "a"\nsecret = "{CANARY} {CANARY}"', "sources.0.secret"),
        (f'[[sources]]\nname = "a"\nsecret = "{CANARY}é"', "sources.0.secret"),
        (f'[[sources]]\nname = "a"\nsecret = "s"\n{CANARY} = 1', "sources.0.(a key): is not a setting"),
        (f"{CANARY} = 1", "receiver.toml: (a key): is not a setting"),
        ('[[sources]]\nname = "a"\nsecret = "s"\nclipia_live_canary = 1', "sources.0.(a key)"),
        (f'[budgets]\n{CANARY} = "x"', "budgets.(a key)"),
        (f'api_tokens = ["{CANARY}"]', "RECEIVER_API_TOKENS: entry 1"),
        (
            f'api_tokens = [{{name = "a", token = "{CANARY}é", scopes = ["read"]}}]',
            "RECEIVER_API_TOKENS: entry 1",
        ),
        (f'[[destinations]]\nname = "{CANARY}"\nurl = "file:x"', "destinations.0.name"),
        (f'log_level = "{CANARY}"', "RECEIVER_LOG_LEVEL"),
        (f"{CANARY} = 1\n{CANARY} = 2", "not TOML"),
        (f"secret = {CANARY}", "not TOML"),
        (f"[a]\n[a.{CANARY}]\n[a.{CANARY}]", "not TOML"),
        (f"x = {{{CANARY} = 1, {CANARY} = 2}}", "not TOML"),
    ],
)
def test_mistakes_in_the_file_are_named_and_not_shown(content: str, where: str) -> None:
    """An error about receiver.toml names the place, but neither a value nor a key that may be a secret."""
    write_config(content)
    with pytest.raises(SettingsError) as caught:
        Settings.load()
    assert where in str(caught.value)
    assert_hidden(str(caught.value))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("x = " + "[" * 3000 + "]" * 3000, "(RecursionError): it is nested too deeply"),
        ("a." * 3000 + "b = 1", "(RecursionError): it is nested too deeply"),
        ("keep_alive = " + "9" * 5000, "(ValueError): check for a number with thousands of digits"),
    ],
    ids=["lists", "keys", "digits"],
)
def test_a_file_beyond_the_limits_of_the_parser_is_a_mistake(content: str, problem: str) -> None:
    """E4: too deep a nesting and too long a number are errors of the settings, as any other mistake."""
    Path("receiver.toml").write_text(content)
    with pytest.raises(SettingsError) as caught:
        Settings.load()
    assert str(caught.value) == f"receiver.toml cannot be read {problem}"


@pytest.mark.parametrize("quote", ['"', "'", "`"])
@pytest.mark.parametrize("name", VARIABLES)
def test_quotes_that_were_kept_are_an_error(monkeypatch: pytest.MonkeyPatch, name: str, quote: str) -> None:
    """Quotes around a value are an error that names `docker --env-file`, which keeps them."""
    monkeypatch.setenv(name, f"{quote}{VARIABLES[name]}{quote}\n")
    with pytest.raises(SettingsError, match=rf"{name}: the quotes around.*--env-file") as caught:
        Settings.load()
    assert_hidden(str(caught.value))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CLIPIA_KEY", f"clipia_live_{CANARY}ü"),
        ("CLIPIA_KEY", f"clipia_live_{CANARY[:8]} {CANARY[8:]}"),
        ("CLIPIA_KEY", f'"clipia_live_{CANARY}'),
        ("CLIPIA_KEY", f"clipia_live_{CANARY}\u200b\u200bx"),
        ("CLIPIA_KEY", " \n"),
        ("CLIPIA_WEBHOOK_SECRET", f"whsec_{CANARY} whsec_{CANARY}"),
        ("CLIPIA_WEBHOOK_SECRET", f"whsec_{CANARY},'whsec_{CANARY}"),
        ("CLIPIA_WEBHOOK_SECRET", f"whsec_{CANARY}й"),
        ("RECEIVER_API_TOKENS", CANARY),
        ("RECEIVER_API_TOKENS", f"{CANARY}:"),
        ("RECEIVER_API_TOKENS", f"{CANARY}:ops"),
        ("RECEIVER_API_TOKENS", f":{CANARY}"),
        ("RECEIVER_API_TOKENS", f"{CANARY.lower()}{CANARY.lower()}:ops:read"),
        ("RECEIVER_API_TOKENS", f"{TOKEN}:billing-service-of-the-shop"),
        ("RECEIVER_API_TOKENS", f"ops:{CANARY} {CANARY}"),
        ("RECEIVER_API_TOKENS", f"ops:{CANARY}é"),
        ("RECEIVER_API_TOKENS", f"ops:{CANARY}:{CANARY}"),
        ("RECEIVER_API_TOKENS", f"{CANARY.lower()}:{CANARY},{CANARY.lower()}:{CANARY}x"),
        ("RECEIVER_PUBLIC_URL", f"https://user:{CANARY}@hooks.example.com"),
        ("RECEIVER_PUBLIC_URL", f"https://{CANARY}@hooks.example.com"),
        ("RECEIVER_PUBLIC_URL", f"https://hooks.example.com?key={CANARY}"),
        ("RECEIVER_PUBLIC_URL", f"http://{CANARY}.example.com"),
        ("RECEIVER_PUBLIC_URL", f"https://{CANARY} x.example.com"),
        ("RECEIVER_PUBLIC_URL", f"https://{CANARY}:x"),
        ("RECEIVER_PUBLIC_URL", f"https://[{CANARY}"),
        ("RECEIVER_INTERNAL_URL", f"http://user:{CANARY}@receiver.internal"),
        ("RECEIVER_INTERNAL_URL", f"ftp://{CANARY}.internal"),
        ("CLIPIA_BASE_URL", f"https://user:{CANARY}@api.example.com"),
        ("CLIPIA_BASE_URL", f"http://{CANARY}.example.com"),
        ("CLIPIA_BASE_URL", f"http://localhost.{CANARY}.com"),
        ("CLIPIA_BASE_URL", f"https://api.example.com?key={CANARY}"),
        ("CLIPIA_BASE_URL", f"https://{CANARY}:99999"),
        ("CLIPIA_BASE_URL", f"ftp://{CANARY}"),
        ("CLIPIA_BASE_URL", CANARY),
        ("CLIPIA_BASE_URL", "https://"),
        ("RECEIVER_BUDGETS", f"{CANARY}:x"),
        ("RECEIVER_LOG_LEVEL", CANARY),
        ("RECEIVER_POLL_AFTER", CANARY),
        ("RECEIVER_REFUSED_GIVE_UP_AFTER", CANARY),
        ("RECEIVER_INPUT_CHECK", CANARY),
        ("RECEIVER_DESTINATIONS", f'[{{"url": "{CANARY}"}}]'),
        ("RECEIVER_DESTINATIONS", CANARY),
        ("RECEIVER_SOURCES", CANARY),
        ("receiver_sources", CANARY),
        ("RECEIVER_CONFIG", CANARY),
        ("RECEIVER_CONFIG", f"{CANARY}/" * 300),
    ],
)
def test_a_mistyped_variable_is_named_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """An invalid value is an error with the variable's name and without the value."""
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        Settings.load()
    assert name.upper() in str(caught.value) or "the file cannot be read" in str(caught.value)
    assert_hidden(str(caught.value))


def test_an_invalid_token_is_named_by_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the second of two entries is invalid, the error has its number only."""
    monkeypatch.setenv("RECEIVER_API_TOKENS", f"ops:{TOKEN},{CANARY}{CANARY}")
    with pytest.raises(SettingsError, match="RECEIVER_API_TOKENS: entry 2") as caught:
        Settings.load()
    assert_hidden(str(caught.value))


def test_a_media_host_with_a_password_is_named_by_its_place() -> None:
    """An entry that is no host is not shown: it may be a URL with a password."""
    with pytest.raises(SettingsError, match="RECEIVER_MEDIA_HOSTS: entry 2") as caught:
        MediaHosts.parse(["media.example.com", f"https://user:{CANARY}@media.example.com"])
    assert_hidden(str(caught.value))


def test_a_byte_order_mark_in_the_file_is_skipped() -> None:
    """A byte order mark, which some editors write, is ignored."""
    write_config(b'\xef\xbb\xbflog_level = "DEBUG"\n')
    assert Settings.load().log_level == "DEBUG"


@pytest.mark.parametrize("content", ['log_level = "DEBUG"'.encode("utf-16"), b"log_level = '\xff'"])
def test_a_file_that_is_not_utf_8_is_an_error(content: bytes) -> None:
    """A file in UTF-16, which PowerShell writes by default, is an error."""
    write_config(content)
    with pytest.raises(SettingsError, match="not UTF-8"):
        Settings.load()


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty variable counts as unset: Compose files set missing ones to the empty string."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
    assert Settings.load().clipia_key is None


def test_variables_of_cloud_clients_are_stripped_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line feed around AWS_… is removed: the clients of S3 and SQS read it and would sign with it."""
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "GOOGLE_SERVICE_ACCOUNT", "AZURE_STORAGE_KEY"):
        monkeypatch.setenv(name, f" {CANARY}\n")
    Settings.load()
    names = [name for name in os.environ if os.environ[name] == CANARY]
    assert len(names) == 4


@pytest.mark.parametrize("url", ["s3://bucket", "sqs://sqs.eu-central-1.amazonaws.com/123456789012/jobs"])
def test_a_control_character_in_a_cloud_variable_is_an_error_if_it_is_used(
    monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    """A broken AWS_… variable is an error if S3 or SQS is configured, and is ignored otherwise."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", f"{CANARY}\n{CANARY}")
    Settings.load()
    monkeypatch.setenv("RECEIVER_STORAGE_URL" if url.startswith("s3") else "RECEIVER_DESTINATION_URL", url)
    with pytest.raises(SettingsError, match="AWS_SECRET_ACCESS_KEY: contains a line feed") as caught:
        Settings.load()
    assert_hidden(str(caught.value))


def test_values_of_several_lines_are_left_to_cloud_clients() -> None:
    """A service account's JSON and a key in PEM may have several lines."""
    environ = {"GOOGLE_SERVICE_ACCOUNT_KEY": '{\n"private_key": "x"\n}\n', "PATH": " x "}
    strip_cloud_variables(environ)
    assert environ == {"GOOGLE_SERVICE_ACCOUNT_KEY": '{\n"private_key": "x"\n}', "PATH": " x "}


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("AWS_SECRET_ACCESS_KEY", CANARY, CANARY),
        ("AWS_SESSION_TOKEN", CANARY, CANARY),
        ("AZURE_CLIENT_SECRET", f" {CANARY}\n", CANARY),
        ("PGPASSWORD", CANARY, CANARY),
        ("AZURE_STORAGE_SAS_TOKEN", f"?sv=2026-11-30&sig={CANARY}&spr=https", CANARY),
        (
            "AZURE_STORAGE_CONNECTION_STRING",
            f"DefaultEndpointsProtocol=https;AccountKey={CANARY}==;EndpointSuffix=core.windows.net",
            CANARY,
        ),
        ("AWS_WEB_IDENTITY_TOKEN_FILE", "/var/run/secrets/token", ""),
        ("AZURE_FEDERATED_TOKEN_FILE", "/var/run/secrets/token", ""),
        ("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", "/var/run/secrets/token", ""),
        ("AWS_CONTAINER_CREDENTIALS_FULL_URI", "https://core.windows.net", ""),
        ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "/var/run/secrets/token", ""),
        ("AWS_SHARED_CREDENTIALS_FILE", "/var/run/secrets/token", ""),
        ("AWS_ENDPOINT_URL_SECRETS_MANAGER", "https://core.windows.net", ""),
        ("GOOGLE_APPLICATION_CREDENTIALS", "/var/run/secrets/token", ""),
        ("AZURE_TOKEN_CREDENTIALS", "production", ""),
    ],
)
def test_of_cloud_variables_only_the_secrets_are_masked(name: str, value: str, secret: str) -> None:
    """A key is masked; a path, a URI, a kind, and the dates and hosts beside a key are not."""
    strip_cloud_variables({name: value})
    words = "2026-11-30 production https://core.windows.net /var/run/secrets/token"
    assert mask(words) == words
    assert mask(f"refused {secret}") == (f"refused {MASK}" if secret else "refused ")


@pytest.mark.parametrize("variable", ["RECEIVER_DATABASE_URL", "RECEIVER_STORAGE_URL", "CLIPIA_KEY"])
def test_a_secret_with_commas_is_masked_whole(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    """A comma separates values in lists only; a password may contain commas."""
    secret = "hun,ter,222,xyz"
    url = {
        "RECEIVER_DATABASE_URL": f"postgresql://u:{secret}@h/d",
        "RECEIVER_STORAGE_URL": f"s3://u:{secret}@b",
    }
    monkeypatch.setenv(variable, url.get(variable, secret))
    Settings.load()
    assert mask(f"refused {secret}") == f"refused {MASK}"


def assert_hidden(text: str) -> None:
    """Assert that a text contains no recognizable part of the canary."""
    lowered = text.lower()
    for at in range(len(CANARY) - 5):
        assert CANARY[at : at + 6].lower() not in lowered
    assert TOKEN[:8] not in lowered
