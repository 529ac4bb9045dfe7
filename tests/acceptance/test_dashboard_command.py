"""`receiver dashboard`: one command from a database to its dashboard."""

import signal
from pathlib import Path

import httpx
from support.commands import run_command, shown_login

OTHER = "0123456789abcdef-ops"


def log_in(url: str, token: str) -> httpx.Response:
    """Send the form of the login, as its page does."""
    return httpx.post(f"{url}/login", data={"token": token}, headers={"sec-fetch-site": "same-origin"})


def test_the_printed_token_opens_the_dashboard_and_nothing_else(tmp_path: Path) -> None:
    """It is the only token, its caller is the user of the command, and no call of `/v1` is served."""
    settings = {
        "RECEIVER_DATABASE_URL": f"sqlite:///{tmp_path / 'receiver.db'}",
        "RECEIVER_API_TOKENS": f"ops:{OTHER}",
    }
    assert run_command("migrate", settings=settings, cwd=tmp_path).returncode == 0
    with shown_login("dashboard", "--port", "0", cwd=tmp_path, **settings) as (url, token, process):
        assert url.startswith("http://127.0.0.1:")
        assert [log_in(url, each).status_code for each in (f"{token}x", OTHER)] == [401, 401]
        assert httpx.get(url).status_code == 303
        cookie = log_in(url, token).headers["set-cookie"].partition(";")[0]
        page = httpx.get(url, headers={"cookie": cookie})
        assert page.status_code == 200
        assert "on the command line" in page.text
        for path in ("/v1/status", "/metrics", "/clipia/webhook"):
            answer = httpx.get(url.replace("/dashboard", path), headers={"authorization": f"Bearer {token}"})
            assert answer.status_code == 404, path
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0


def test_without_tables_it_says_what_to_run(tmp_path: Path) -> None:
    """An empty folder gets a sentence, not a page of errors."""
    done = run_command("dashboard", "--port", "0", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        b"error: the database has no tables yet: run `receiver migrate`\n",
    )
