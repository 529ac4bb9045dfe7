"""Counts of results by model, once the transaction that recorded them is committed."""

from collections import Counter
from collections.abc import Iterable

from receiver.core.payload import Generation
from receiver.db.job_events import FinishedJob
from receiver.metrics import CREDITS, GENERATION_SECONDS, GENERATIONS, model_label
from receiver.price import Credits


def count_results(results: Iterable[Generation]) -> None:
    """Count results, and the credits of those that are completed: a failure is refunded in full."""
    counts, costs = Counter[tuple[str, str]](), dict[str, Credits]()
    for result in results:
        label = model_label(result.model)
        completed = result.status == "OK"
        counts[label, "completed" if completed else "canceled" if result.canceled else "failed"] += 1
        if completed:
            costs[label] = costs.get(label, 0) + (result.cost or 0)
    for labels, count in counts.items():
        GENERATIONS.labels(*labels).inc(count)
    for label, cost in costs.items():
        CREDITS.labels(label).inc(cost)


def observe_jobs(jobs: Iterable[FinishedJob | None]) -> None:
    """Observe how long jobs took, from their submission to their result."""
    for job in jobs:
        if job is not None and job.seconds is not None:
            GENERATION_SECONDS.labels(model_label(job.model)).observe(max(0.0, job.seconds))
