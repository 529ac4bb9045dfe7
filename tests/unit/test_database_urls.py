"""RECEIVER_DATABASE_URL: the translation of libpq's parameters, and the errors for other ones."""

import ssl
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
from sqlalchemy import URL
from support.certificates import make_certificate

from receiver.db.urls import PostgresqlUrl, parse_url
from receiver.errors import SettingsError


def postgresql(url: str) -> PostgresqlUrl:
    """Return the arguments of a PostgreSQL URL."""
    parsed = parse_url(url)
    assert isinstance(parsed, PostgresqlUrl)
    return parsed


def passed_on(url: str) -> dict[str, str]:
    """Return the parameters that the driver reads from a URL."""
    dsn = postgresql(url).arguments["dsn"]
    return {name: values[0] for name, values in parse_qs(dsn.partition("?")[2]).items()}


@pytest.mark.parametrize(
    "url", ["", "mysql://x", "sqlite://", "sqlite:///:memory:", "sqlite:///file:x?mode=memory&uri=true", "x"]
)
def test_unusable_urls_are_errors(url: str) -> None:
    """If the database is in memory or of an unknown kind, the error tells how to write the URL."""
    with pytest.raises(SettingsError, match="RECEIVER_DATABASE_URL"):
        parse_url(url)


def test_a_file_of_sqlite_is_taken() -> None:
    """A path becomes a URL of SQLAlchemy's asynchronous driver."""
    parsed = parse_url("sqlite:///a.db")
    assert isinstance(parsed, URL)
    assert parsed.render_as_string() == "sqlite+pysqlite:///a.db"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgres://u@h/d", {"host": ["h"], "user": "u", "database": "d"}),
        ("postgresql+psycopg://u@h/d", {"host": ["h"], "user": "u", "database": "d"}),
        (
            "postgresql://u:p%40%2F%3A%25w@h:6432/d%20e",
            {"host": ["h"], "port": [6432], "user": "u", "password": "p@/:%w", "database": "d e"},
        ),
        ("postgresql://u:p#?/w@h/d", {"host": ["h"], "user": "u", "password": "p#?/w", "database": "d"}),
        ("postgresql://u:@h", {"host": ["h"], "user": "u"}),
        ("postgresql://h", {"host": ["h"]}),
        ("postgresql://", {}),
        ("postgresql:///d?host=/var/run/postgresql", {"host": ["/var/run/postgresql"], "database": "d"}),
        ("postgresql://u@%2Fvar%2Frun/d", {"host": ["/var/run"], "user": "u", "database": "d"}),
        ("postgresql://[::1]:5433/d", {"host": ["::1"], "port": [5433], "database": "d"}),
        (
            "postgresql://?host=h&port=5433&user=u&password=p&dbname=d",
            {"host": ["h"], "port": [5433], "user": "u", "password": "p", "database": "d"},
        ),
        ("postgresql:///?host=a,b&port=1,2", {"host": ["a", "b"], "port": [1, 2]}),
        ("postgresql://a,b:5433/d", {"host": ["a", "b"], "port": [5432, 5433], "database": "d"}),
    ],
)
def test_places_are_read_as_libpq_does(url: str, expected: dict[str, Any]) -> None:
    """Host, port, user, password and database come from the URL or its parameters, percent-decoded once."""
    arguments = dict(postgresql(url).arguments)
    arguments.pop("dsn")
    assert arguments == expected


def test_parameters_of_the_driver_are_passed_on(tmp_path: Path) -> None:
    """The driver reads the parameters for TLS, password file, service and the kind of server."""
    certificate = make_certificate(tmp_path / "own certificate.pem")
    expected = {
        "sslmode": "verify-ca",
        "sslrootcert": str(certificate),
        "sslcert": str(certificate),
        "sslkey": str(certificate),
        "ssl_min_protocol_version": "TLSv1.3",
        "passfile": str(tmp_path / "passfile"),
        "service": "main",
        "target_session_attrs": "primary",
    }
    query = "&".join(f"{name}={value.replace(' ', '%20')}" for name, value in expected.items())
    assert passed_on(f"postgresql://u@h/d?{query}") == expected


@pytest.mark.parametrize(("name", "value"), [("ssl", "require"), ("sslmode", "require")])
def test_both_spellings_of_the_mode_are_taken(name: str, value: str) -> None:
    """`ssl`, which earlier releases took, means `sslmode`."""
    assert passed_on(f"postgresql://h/d?{name}={value}") == {"sslmode": value}


def test_settings_go_to_the_server() -> None:
    """`application_name` and `options` become settings of the server; the name has a default."""
    assert postgresql("postgresql://h").server_settings == {"application_name": "clipia-receiver"}
    url = "postgresql://h?application_name=shop&options=-c%20search_path%3Dapp"
    assert postgresql(url).server_settings == {"application_name": "shop", "options": "-c search_path=app"}


@pytest.mark.parametrize(("text", "seconds"), [("10", 10.0), ("0", None), ("-1", None), ("", None)])
def test_connect_timeout_is_in_seconds(text: str, seconds: float | None) -> None:
    """If the value is missing, empty, zero or negative, the default stays."""
    assert postgresql(f"postgresql://h?connect_timeout={text}").connect_timeout == seconds


@pytest.mark.parametrize(
    "query",
    [
        "keepalives=1&keepalives_idle=30&keepalives_interval=5&keepalives_count=3&tcp_user_timeout=5",
        "gssencmode=disable&load_balance_hosts=disable&sslsni=1&sslcompression=0&sslcertmode=allow",
        "channel_binding=prefer",
        "channel_binding=disable",
        "client_encoding=UTF8",
        "fallback_application_name=x",
        "sslmode=",
    ],
)
def test_parameters_without_effect_are_dropped(query: str) -> None:
    """A parameter is ignored if it has no effect on the driver or no value."""
    parsed = postgresql(f"postgresql://h/d?{query}")
    assert parsed.arguments == {"dsn": "postgresql://", "host": ["h"], "database": "d"}


@pytest.mark.parametrize(
    "name",
    ["hostaddr", "require_auth", "requirepeer", "replication", "pgbouncer", "statement_cache_size", "x"],
)
def test_other_parameters_are_named_in_the_error(name: str) -> None:
    """If a parameter has no counterpart, the error names it and does not show its value."""
    with pytest.raises(SettingsError, match=f"RECEIVER_DATABASE_URL.*'{name}'") as caught:
        parse_url(f"postgresql://u:canary@h/d?sslmode=require&{name}=canary")
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize(
    "query",
    [
        "sslmode=canary",
        "target_session_attrs=canary",
        "ssl_min_protocol_version=canary",
        "channel_binding=canary",
        "channel_binding=require&sslmode=require",
        "channel_binding=require",
        "gssencmode=require",
        "client_encoding=LATIN1",
        "connect_timeout=canary",
        "port=canary",
        "port=1,2",
        "sslrootcert=/canary",
        "sslcert=/canary",
        "sslkey=/canary",
        "sslrootcert=system&sslmode=require",
    ],
)
def test_unusable_values_are_errors(query: str) -> None:
    """If the driver does not support a value, or a file is missing, the error does not show it."""
    with pytest.raises(SettingsError, match="RECEIVER_DATABASE_URL") as caught:
        parse_url(f"postgresql://u:canary@h/d?{query}")
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize("url", ["postgresql://u:p@w@h/d", "postgresql://h:p:1/d", "postgresql://[::1/d"])
def test_a_url_that_cannot_be_split_is_an_error(url: str) -> None:
    """If a password has an @ that is not written as %40, the error tells so."""
    with pytest.raises(SettingsError, match="RECEIVER_DATABASE_URL"):
        parse_url(url)


@pytest.mark.parametrize("mode", ["", "&sslmode=verify-full", "&channel_binding=require"])
def test_the_store_of_the_system_verifies_the_server(mode: str) -> None:
    """`sslrootcert=system` checks certificate and host name against the system's authorities."""
    arguments = postgresql(f"postgresql://h/d?sslrootcert=system{mode}").arguments
    context = arguments["ssl"]
    assert isinstance(context, ssl.SSLContext)
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert arguments["dsn"] == "postgresql://"


def test_the_store_of_the_system_goes_with_a_certificate(tmp_path: Path) -> None:
    """A client certificate and the oldest TLS version are also used with the system's store."""
    certificate = make_certificate(tmp_path / "client.pem")
    query = f"sslrootcert=system&sslcert={certificate}&ssl_min_protocol_version=TLSv1.3"
    context = postgresql(f"postgresql://h/d?{query}").arguments["ssl"]
    assert context.minimum_version is ssl.TLSVersion.TLSv1_3
    (tmp_path / "client.pem").write_text("canary")
    with pytest.raises(SettingsError, match="sslcert") as caught:
        parse_url(f"postgresql://h/d?{query}")
    assert "canary" not in str(caught.value)


def test_one_of_several_hosts_has_to_take_writes() -> None:
    """If there are several hosts, a standby is skipped unless the URL sets another target."""
    assert passed_on("postgresql://a,b/d") == {"target_session_attrs": "read-write"}
    assert passed_on("postgresql://a,b/d?target_session_attrs=any") == {"target_session_attrs": "any"}
