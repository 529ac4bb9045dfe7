"""Which worker `receiver replay` finds missing while it waits."""

from importlib import import_module
from typing import Any

import pytest

from receiver.status import WorkerStatus

module: Any = import_module("receiver.cli.replay")

ENDED = {"main": {"delivered": 2}, "other": {"dead": 1}}
PENDING = {"main": {"delivered": 1, "pending": 1}, "other": {"pending": 1}}


def worker(*lanes: str) -> WorkerStatus:
    """Return a running worker with these lanes."""
    return WorkerStatus(host="here", pid=7, lanes=list(lanes), running=True, seen_seconds_ago=0.0, live=None)


@pytest.mark.parametrize(
    ("state", "deliveries", "lanes", "missing"),
    [
        ("pending", {}, ["replay", "destination:main", "destination:other"], None),
        ("pending", {}, ["replay", "destination:main"], "'other'"),
        ("completed", PENDING, ["destination:other"], None),
        ("completed", PENDING, ["destination:third"], "'main'"),
        ("completed", ENDED, ["destination:third"], None),
        ("canceled", {}, ["destination:third"], None),
    ],
)
def test_a_worker_is_missing_only_for_work_that_is_left(
    state: str, deliveries: dict[str, dict[str, int]], lanes: list[str], missing: str | None
) -> None:
    """E12: a replay needs workers for its order and its pending deliveries; one that has ended needs none."""
    order = {"state": state, "deliveries": deliveries, "destinations": ["main", "other"]}
    found = module._missing_worker(order, [worker(*lanes)])
    assert (found is None) == (missing is None)
    assert (missing or "") in (found or "")
