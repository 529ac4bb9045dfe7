"""The README's production layout, as it is printed: each documented metric is in one of its scrapes."""

import re
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
from support.commands import ReceiverProcess, wait_for_lines
from support.jobs import IMAGE, LIVE_KEY, TOKEN, Sandbox
from support.payloads import body, signed
from support.production import layout
from support.servers import Postgres

ROOT = Path(__file__).parents[2]
SECONDS = 60.0


def documented() -> set[str]:
    """Return the names in the tables of the page."""
    rows = re.findall(r"^\| `receiver_.*?\|", (ROOT / "docs/metrics.md").read_text("utf-8"), re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`(receiver_\w+)", row)}


def scrape(url: str) -> set[str]:
    """Return the names of the series at an address; a histogram has the name of its count."""
    answer = httpx.get(url, headers={"Authorization": f"Bearer {TOKEN}"}, verify=False)
    assert answer.status_code == 200, answer.text
    found = re.findall(r"^(receiver_\w+)", answer.text, re.MULTILINE)
    return {name.removesuffix("_count") for name in found}


def metrics_url(process: ReceiverProcess) -> str:
    """Return the address of the metrics, from the log."""
    urls = [str(record["url"]) for record in process.records() if record["event"] == "metrics"]
    return urls[0] if urls else f"{process.url}/metrics"


def test_each_documented_metric_can_be_scraped(tmp_path: Path, postgres: Postgres) -> None:
    """After webhooks and a job, each metric has a value in one of the processes; none is public."""
    events = tmp_path / "events.jsonl"
    with ExitStack() as stack:
        sandbox = stack.enter_context(Sandbox(tmp_path, duration=0))
        settings = {
            "RECEIVER_DATABASE_URL": postgres.url(template="migrated"),
            "RECEIVER_DESTINATION_URL": f"file:{events}",
            "RECEIVER_MEDIA_HOSTS": sandbox.url,
            "RECEIVER_API_TOKENS": f"ops:{TOKEN}",
            "CLIPIA_KEY": LIVE_KEY,
            "CLIPIA_BASE_URL": sandbox.url,
        }
        processes = []
        for number, arguments in enumerate(layout()):
            folder = tmp_path / str(number)
            folder.mkdir()
            processes.append(stack.enter_context(ReceiverProcess(folder, *arguments, **settings)))
        public, internal, worker = processes
        callback = f"{public.url}/clipia/webhook"
        content = body("r-1")
        with httpx.Client(verify=False, headers={"Authorization": f"Bearer {TOKEN}"}) as client:
            assert client.post(callback, content=content, headers=signed(content)).status_code == 200
            forged = signed(content, secret="whsec_other")
            assert client.post(callback, content=content, headers=forged).status_code == 401
            assert client.get(f"{public.url}/metrics").status_code == 404
            assert client.get(metrics_url(public), headers={"Authorization": ""}).status_code == 401
            assert client.get(f"{metrics_url(public)}/../livez").status_code == 404
            job = {"model": IMAGE[0], "input": IMAGE[1]}
            assert client.post(f"{internal.url}/v1/jobs", json=job).status_code == 201
        wait_for_lines(events, 2, seconds=SECONDS)
        deadline = time.monotonic() + SECONDS
        missing = documented()
        assert len(missing) > 20
        while missing and time.monotonic() < deadline:
            missing = documented() - set[str]().union(*(scrape(metrics_url(each)) for each in processes))
        assert missing == set()
        assert "receiver_deliveries_total" in scrape(metrics_url(worker))
        assert not scrape(metrics_url(public)) & {"receiver_backlog", "receiver_dead_letters"}
