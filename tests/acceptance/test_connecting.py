"""RECEIVER_DATABASE_URL as operators write it: through pgbouncer, with libpq's parameters, and wrong."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from support.certificates import make_certificate
from support.commands import ReceiverProcess, run_command, wait_for_lines
from support.payloads import SECRET, body, signed
from support.servers import PgBouncer, Postgres, free_port

WEBHOOKS = 60


@pytest.fixture(params=["transaction", "session"])
def pooler(request: pytest.FixtureRequest, postgres: Postgres) -> Iterator[PgBouncer]:
    """A pgbouncer in each mode; in session mode with the default size, as each connection takes a session."""
    size = 2 if request.param == "transaction" else 20
    with PgBouncer(postgres, mode=request.param, pool_size=size) as running:
        yield running


def test_processes_share_a_pooler(pooler: PgBouncer, tmp_path: Path) -> None:
    """Two web processes and two workers share a pgbouncer: each webhook is acked and forwarded."""
    url = pooler.url()
    settings = {
        "RECEIVER_DATABASE_URL": url,
        "RECEIVER_DESTINATION_URL": f"file:{tmp_path / 'events.jsonl'}",
        "CLIPIA_WEBHOOK_SECRET": SECRET,
    }
    assert run_command("migrate", settings=settings).returncode == 0
    checked = run_command("check", settings=settings, cwd=tmp_path)
    assert b"database: postgresql" in checked.stdout
    with ExitStack() as stack:
        arguments = ("serve", "--port", "0", "--no-worker", "--workers", "2")
        web = stack.enter_context(ReceiverProcess(tmp_path, *arguments, **settings))
        workers = []
        for name in ("first", "second"):
            (tmp_path / name).mkdir()
            workers.append(stack.enter_context(ReceiverProcess(tmp_path / name, "worker", **settings)))
        client = stack.enter_context(
            httpx.Client(transport=httpx.HTTPTransport(retries=20, verify=False), timeout=20)
        )
        names = [f"r-{number}" for number in range(WEBHOOKS)]
        for name in names:
            content = body(name, payload={"model": "m", "output": {}, "cost": 1})
            response = client.post(f"{web.url}/clipia/webhook", content=content, headers=signed(content))
            assert response.status_code == 200
        assert client.get(f"{web.url}/readyz").status_code == 200
        lines = wait_for_lines(tmp_path / "events.jsonl", WEBHOOKS)
        assert sorted(str(line["subject"]) for line in lines) == sorted(names)
        for worker in workers:
            printed = [record["event"] for record in worker.records() if "pooler" in str(record["event"])]
            assert len(printed) == 1
            assert not [record for record in worker.records() if record["level"] in {"warning", "error"}]


def test_parameters_of_libpq_reach_the_server(postgres: Postgres, tmp_path: Path) -> None:
    """The application name and options of the URL apply, and the first host that answers is used."""
    url = postgres.url(template="migrated")
    name = url.rpartition("/")[2]
    passwords = tmp_path / "passwords"
    passwords.write_text("*:*:*:*:secret")
    passwords.chmod(0o600)
    query = (
        f"application_name=shop&options=-c%20work_mem%3D5MB&connect_timeout=5&keepalives=1&passfile={passwords}"
        "&sslmode=prefer&channel_binding=prefer&gssencmode=disable"
    )
    hosts = f"127.0.0.1:{free_port()},127.0.0.1:{postgres.port}"
    settings = {
        "RECEIVER_DATABASE_URL": f"postgresql://postgres@{hosts}/{name}?{query}",
        "CLIPIA_WEBHOOK_SECRET": SECRET,
    }
    with ReceiverProcess(tmp_path, **settings) as receiver:
        content = body("r-1")
        answer = httpx.post(
            f"{receiver.url}/clipia/webhook", content=content, headers=signed(content), verify=False
        )
        assert answer.status_code == 200
        named = f"SELECT DISTINCT application_name FROM pg_stat_activity WHERE datname = '{name}'"
        assert postgres.sql(named).stdout.split() == ["shop"]


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("foo=canary", "'foo'"),
        ("sslmode=canary", "sslmode"),
        ("options=-c%20canary%3D1", "options"),
        ("sslmode=require", "TLS"),
        ("sslmode=verify-full", "sslrootcert"),
        ("target_session_attrs=standby", "target_session_attrs"),
        ("port=99999", "port"),
        ("sslmode=require&sslcert={folder}/damaged.pem&sslkey={folder}/damaged.pem", "TLS"),
        ("sslmode=require&sslcert={folder}/canary.pem", "sslcert"),
        ("dbname=canary&user=canary", "login"),
    ],
)
def test_a_url_that_cannot_be_used_is_one_sentence(
    postgres: Postgres, tmp_path: Path, query: str, words: str
) -> None:
    """An unusable parameter is an error in one sentence, which does not show its value."""
    make_certificate(tmp_path / "whole.pem")
    (tmp_path / "damaged.pem").write_text("canary")
    base = postgres.url().rpartition("/")[0]
    path = "" if "dbname" in query else "/postgres"
    base = base if "user=" not in query else base.replace("postgres@", "")
    url = f"{base}{path}?{query.format(folder=tmp_path)}"
    if "port=" in query:
        url = f"postgresql:///postgres?host=127.0.0.1&{query}"
    settings = {"RECEIVER_DATABASE_URL": url, "CLIPIA_WEBHOOK_SECRET": SECRET}
    result = run_command("migrate", settings=settings, cwd=tmp_path)
    printed = (result.stdout + result.stderr).decode()
    assert result.returncode in {1, 2, 6}
    assert len(printed.strip().splitlines()) == 1
    assert words in printed
    assert "canary" not in printed


@pytest.mark.parametrize("command", [("check",), ("serve", "--port", "0"), ("worker",), ("migrate",)])
@pytest.mark.parametrize("query", ["foo=canary", "options=-c%20canary%3D1"])
def test_every_command_rejects_a_wrong_parameter(
    postgres: Postgres, tmp_path: Path, command: tuple[str, ...], query: str
) -> None:
    """All commands that open the database reject a wrong parameter with the same message."""
    settings = {"RECEIVER_DATABASE_URL": f"{postgres.url()}?{query}", "CLIPIA_WEBHOOK_SECRET": SECRET}
    result = run_command(*command, settings=settings, cwd=tmp_path)
    printed = (result.stdout + result.stderr).decode()
    assert result.returncode in {1, 2, 6}
    assert "RECEIVER_DATABASE_URL" in printed
    assert "Traceback" not in printed
    assert "canary" not in printed
