"""The alert rules, their runbooks and the dashboard fit the metrics."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY, Counter, Histogram, generate_latest
from prometheus_client.metrics import MetricWrapperBase
from support.servers import missing

from receiver import metrics
from receiver.__main__ import _keep_metrics_in_memory

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy/prometheus"
RULES = (PROMETHEUS / "rules.yml").read_text(encoding="utf-8")
DASHBOARD: Any = json.loads((ROOT / "deploy/grafana/receiver.json").read_text(encoding="utf-8"))
RUNBOOKS = ROOT / "docs/runbooks"

_NAME = re.compile(r"\breceiver_\w+")


def promtool(*arguments: str, given: bytes = b"") -> None:
    """Run promtool; its output is the message of a failure."""
    if shutil.which("promtool") is None:
        missing("promtool", "apt-get install prometheus")
    command = ["promtool", *arguments]
    ran = subprocess.run(command, cwd=PROMETHEUS, input=given, capture_output=True, timeout=60, check=False)
    assert ran.returncode == 0, (ran.stdout + ran.stderr).decode()


def queries() -> list[str]:
    """Return all queries of the dashboard."""
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]


def our_metrics() -> list[MetricWrapperBase]:
    """Return all metrics."""
    return [each for each in vars(metrics).values() if isinstance(each, MetricWrapperBase)]


def names_of(metric: MetricWrapperBase) -> set[str]:
    """Return the names of the series of a metric."""
    endings: tuple[str, ...] = ("_total",) if isinstance(metric, Counter) else ("",)
    if isinstance(metric, Histogram):
        endings = ("_bucket", "_sum", "_count")
    return {metric._name + ending for ending in endings}


def sample_names() -> dict[str, set[str]]:
    """Return the name of each series that the receiver shows, with its labels."""
    return {name: set(each._labelnames) for each in our_metrics() for name in names_of(each)}


def test_the_rules_are_valid() -> None:
    """Promtool accepts the rules and the example of a configuration that names them."""
    promtool("check", "rules", "--lint-fatal", "rules.yml")
    promtool("check", "config", "prometheus.yml")


def test_the_names_of_metrics_are_conventional() -> None:
    """Promtool can read a scrape and has no objection to a name or a unit."""
    promtool("check", "metrics", given=b"".join(map(generate_latest, our_metrics())))


def test_each_alert_is_silent_and_fires() -> None:
    """Each rule has a test in which it is silent and then fires."""
    promtool("test", "rules", "rules_test.yml")
    # A misspelt name would pass: promtool does not require that an alert exists.
    tests = (PROMETHEUS / "rules_test.yml").read_text(encoding="utf-8")
    alerts = re.findall(r"alert: (\w+)", RULES)
    assert re.findall(r"- alertname: (\w+)", tests) == alerts
    assert re.findall(r"\{alertname: (\w+), eval_time: \w+, exp_alerts: \[\]\}", tests) == alerts


@pytest.mark.parametrize("text", [*RULES.split("- alert: ")[1:], *queries()], ids=lambda text: text[:40])
def test_queries_name_existing_metrics(text: str) -> None:
    """Each series in a rule or a query exists, with the labels that the query groups by."""
    names = sample_names()
    used = set(_NAME.findall(text))
    assert used or "up{" in text
    assert used <= names.keys()
    scraped = {"instance", "job", "le"}
    grouped = {label for group in re.findall(r"by \(([^)]*)\)", text) for label in group.split(", ")}
    assert grouped <= set.union(scraped, *(names[name] for name in used))


def test_the_dashboard_is_valid_and_shows_every_metric(tmp_path: Path) -> None:
    """Promtool can parse each query, and no metric is left out."""
    rules = [f"- {{record: q{number}, expr: {json.dumps(query)}}}" for number, query in enumerate(queries())]
    text = "groups: [{name: dashboard, rules: [\n" + ",\n".join(rule[2:] for rule in rules) + "\n]}]\n"
    file = tmp_path / "rules.yml"
    file.write_text(text.replace("$__rate_interval", "5m"))
    promtool("check", "rules", str(file))
    shown = set(_NAME.findall(" ".join(queries())))
    missing = [each._name for each in our_metrics() if not names_of(each) & shown]
    assert missing == []


def test_each_alert_has_its_runbook() -> None:
    """Each alert names a page of its own, with its meaning, how to confirm it and how to fix it."""
    pages = re.findall(r"runbook: (\S+)", RULES)
    alerts = re.findall(r"alert: (\w+)", RULES)
    for alert, page in zip(alerts, pages, strict=True):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert f"`{alert}`" in text
        assert re.findall(r"^## (.+)$", text, re.MULTILINE) == ["Meaning", "Confirm", "Fix"]
        assert "`receiver " in text or "RECEIVER_" in text
    assert len(set(pages)) == len(pages)


def test_gauges_of_rows_are_apart() -> None:
    """A gauge that counts rows is not among those that are shown before the database was read."""
    assert metrics.ROWS is not REGISTRY
    names = {"receiver_backlog", "receiver_dead_letters", "receiver_submissions_paused"}
    shown = {name: REGISTRY.get_sample_value(name) for name in names}
    assert shown == dict.fromkeys(names)


def test_labels_of_models_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model has a label of its own if its name is plain, up to a number; all others share one."""
    monkeypatch.setattr(metrics, "_models", set())
    plain = [f"model-{number}" for number in range(metrics.MAX_MODELS + 5)]
    labels = [metrics.model_label(name) for name in plain]
    assert labels == [*plain[: metrics.MAX_MODELS], *["other"] * 5]
    assert metrics.model_label("model-3") == "model-3"
    for name in (None, "", "m\nFAKE", "Ä", "x" * 65, '"', "m{}"):
        assert metrics.model_label(name) == "other"


def test_metrics_are_never_kept_in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command ignores the variables with which prometheus_client would write files and show gauges as 0."""
    for name in ("PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir"):
        monkeypatch.setenv(name, "missing")
    _keep_metrics_in_memory()
    assert [name for name in os.environ if name.lower() == "prometheus_multiproc_dir"] == []
