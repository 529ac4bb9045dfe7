"""Each state that rows can have has its explanation: one state, one sentence, facts and the next command."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final, cast, get_args
from uuid import UUID

import orjson
import pytest

from receiver.cli.why import STATUSES
from receiver.core.lane_names import FAN_OUT_LANE, MEDIA_LANE, POLL_LANE, SUBMIT_LANE, destination_lane
from receiver.db.deliveries import FailureGroup
from receiver.db.destinations import Circuit, Pause
from receiver.db.rejections import ListedRejection
from receiver.db.submission_freezes import Freeze
from receiver.db.views import EventDetails, JobDetails
from receiver.db.workers import SeenWorker
from receiver.explain.facts import OUTCOMES, DestinationFacts, Explanation, Facts, Outcome, State
from receiver.explain.verdict import explain

NOW: Final = datetime(2026, 1, 31, 14, 30, tzinfo=UTC)
AT: Final = datetime(2026, 1, 31, 14, 2, tzinfo=UTC)
LATER: Final = NOW + timedelta(minutes=5)
ID: Final = UUID(int=7)
OTHER_ID: Final = UUID(int=8)
MAIN: Final = DestinationFacts(name="main")
LANES: Final = [FAN_OUT_LANE, MEDIA_LANE, destination_lane("main")]
KEYED: Final = [*LANES, SUBMIT_LANE, POLL_LANE]


def worker(lanes: list[str], *, account: str | None = None, age: float = 1.0) -> SeenWorker:
    """Return a worker on record."""
    return SeenWorker(id=ID, host="web-1", pid=41, lanes=lanes, account=account, age=age)


WORKER: Final = worker(KEYED, account="live-1")
WITHOUT_KEY: Final = worker(LANES)


def error(code: str, message: str = "words") -> str:
    """Return an error as jobs have it."""
    return orjson.dumps({"code": code, "message": message}).decode()


def job(state: str = "pending", **values: Any) -> JobDetails:
    """Return a job without an event."""
    names = [*JobDetails.__annotations__, "id", "attempts", "next_attempt_at", "error", "finished_at"]
    row: dict[str, Any] = dict.fromkeys(names)
    row |= {"id": ID, "caller": "shop", "model": "m", "state": state, "has_webhook": True}
    row |= {"account": "live-1", "created_at": AT, "attempt_log": [], "next_attempt_at": LATER}
    return cast("JobDetails", row | values)


def event(state: str = "ready", **values: Any) -> EventDetails:
    """Return an event without deliveries."""
    row = {"seq": 1, "id": ID, "source": "clipia", "request_id": "r-1", "origin": "webhook", "state": state}
    row |= {"reason": None, "status": "OK", "model": "m", "cost": 40, "received_at": AT, "job_id": None}
    row |= {"receipts": [receipt("accepted")], "receipts_total": 1, "media": [], "deliveries": []}
    return cast("EventDetails", row | values)


def receipt(outcome: str) -> dict[str, Any]:
    """Return a request on record."""
    return {"seq": 0, "received_at": AT, "outcome": outcome, "secret_id": "3f2a", "repeated": 0}


def work(state: str, **values: Any) -> dict[str, Any]:
    """Return the columns that files and deliveries share."""
    row = {"id": ID, "state": state, "attempts": 0, "next_attempt_at": None, "error": None, "created_at": AT}
    return row | {"finished_at": None, "restarted_at": None, "attempt_log": []} | values


def delivery(state: str = "pending", **values: Any) -> dict[str, Any]:
    """Return a delivery to `main` that is due."""
    due = NOW if state == "pending" else None
    return work(state, next_attempt_at=due) | {"destination": "main", "replay_id": None} | values


def file(state: str, **values: Any) -> dict[str, Any]:
    """Return a video."""
    row = {"position": 0, "variant": "original", "kind": "video", "url": "u", "uri": None, "warning": None}
    return work(state) | row | values


def failures(state: str = "pending", *, count: int = 313) -> tuple[FailureGroup, ...]:
    """Return the failures at a destination."""
    group = {"destination": "main", "state": state, "cause": "queue full", "count": count, "first": AT}
    return (cast("FailureGroup", group | {"last": NOW, "example": ID}),)


REJECTION: Final = cast(
    "ListedRejection", {"id": 17, "received_at": AT, "diagnosis": "the clock is off by +413 s"}
)
FAILING: Final = delivery(error="PublishFailed: queue full", attempts=3, next_attempt_at=LATER)
DEAD: Final = delivery("dead", error="PublishRejected: queue full", finished_at=AT)
DONE: Final = delivery("delivered", finished_at=AT)
OLD: Final = DONE | {
    "attempt_log": [{"outcome": "superseded", "number": 0, "error": None, "answer": None, "started_at": AT}]
}
"""Delivered before another body was promoted."""

CASES: Final[list[tuple[State, str, str, dict[str, Any]]]] = [
    ("job_frozen", "frozen since 14:02 by ops: restored", "receiver jobs thaw",
     {"job": job(), "freeze": Freeze(by="ops", reason="restored", restored=True, frozen_at=AT)}),
    ("no_worker", "no worker is running", "receiver worker", {"job": job(), "workers": ()}),
    ("no_worker", "no worker is running", "receiver worker",
     {"job": job(), "workers": [worker(KEYED, account="live-1", age=99.0)]}),
    ("no_key", "process 41 on web-1 has no CLIPIA_KEY", "receiver check",
     {"job": job(), "workers": [WITHOUT_KEY]}),
    ("no_key", "CLIPIA_KEY of the live kind", "receiver check",
     {"job": job(), "workers": [worker(KEYED, account="test-1")]}),
    ("account_paused", "Clipia refuses the account (invalid_api_key: words)", "receiver account",
     {"job": job(), "pause": {"code": "invalid_api_key", "message": "words"}}),
    ("job_refused", "refused it for now since 14:02 (insufficient_credits: words); next attempt at 14:35",
     "receiver account", {"job": job(refused_at=AT, error=error("insufficient_credits"))}),
    ("job_pending", "not accepted it yet (no_answer: words)", "", {"job": job(error=error("no_answer"))}),
    ("job_pending", "waits for its turn", "receiver account", {"job": job(next_attempt_at=AT)}),
    ("job_submitted", "worked on it since 14:02 (40 %); its webhook is awaited, and Clipia is asked at 14:35",
     "receiver events fetch r-1",
     {"job": job("submitted", submitted_at=AT, progress=40, request_id="r-1")}),
    ("job_submitted", "the last poll failed (no_answer: words)", "receiver events fetch r-1",
     {"job": job("submitted", request_id="r-1", error=error("no_answer"))}),
    ("no_key", "no running worker polls it", "receiver check",
     {"job": job("submitted", request_id="r-1", has_webhook=False), "workers": [WITHOUT_KEY]}),
    ("job_submitted", "its webhook is awaited", "receiver events fetch r-1",
     {"job": job("submitted", request_id="r-1"), "workers": [WITHOUT_KEY]}),
    ("webhook_rejected", "a request with its id was rejected, last at 14:02: the clock is off by +413 s",
     "receiver rejections show 17",
     {"job": job("submitted", request_id="r-1"), "rejections": [REJECTION]}),
    ("webhook_rejected", "2 requests with its id were rejected", "receiver rejections show 17",
     {"rejections": [REJECTION, REJECTION]}),
    ("job_unsure", "may or may not have it (no_answer: words)", f"receiver jobs resubmit {ID}",
     {"job": job("unsure", error=error("no_answer"))}),
    ("job_unsure", "may or may not have it", "receiver events fetch r-1",
     {"job": job("unsure", request_id="r-1")}),
    ("job_failed", "it failed (content_policy: words); nothing was charged", "receiver jobs resubmit",
     {"job": job("failed", error=error("content_policy"), charged=0)}),
    ("job_canceled", "it was canceled (canceled: words)", "receiver jobs resubmit",
     {"job": job("canceled", error=error("canceled"))}),
    ("event_pruned", "its event has been pruned", "", {"job": job("completed", request_id="r-1")}),
    ("event_erased", "erased by a person", "", {"event": event("erased")}),
    ("event_unrecognized", "not recognized as an event (not_json)", f"receiver events show {ID}",
     {"event": event("unrecognized", reason="not_json")}),
    ("event_unrecognized", "this one can read it", "receiver events recover --dry-run",
     {"event": event("unrecognized", recoverable=True)}),
    ("event_received", "stored 1680 s ago and is forwarded next", "receiver status",
     {"event": event("received")}),
    ("no_worker", "no worker is running that forwards it", "receiver worker",
     {"event": event("received"), "workers": ()}),
    ("waits_for_media", "video stored; main gets it when its files are stored", "",
     {"event": event("fetching", media=[file("stored")], deliveries=[delivery(next_attempt_at=None)])}),
    ("media_pending", "a file is not stored yet: answered 503", f"receiver media give-up {ID}",
     {"event": event("fetching", media=[file("pending", error="answered 503")],
                     deliveries=[delivery(next_attempt_at=None)])}),
    ("no_worker", "no running worker downloads files", "receiver worker",
     {"event": event("fetching", media=[file("pending")]), "workers": [worker([FAN_OUT_LANE])]}),
    ("media_lost", "a file is lost: answered 404; delivered to main", f"receiver replay {ID} --media",
     {"event": event(media=[file("gone", error="answered 404")], deliveries=[DONE])}),
    ("media_lost", "a file is no media", f"receiver replay {ID} --media",
     {"event": event(media=[file("not_media")], deliveries=[DONE])}),
    ("delivered", "video skipped; delivered to main at 14:02", "",
     {"event": event(media=[file("skipped")], deliveries=[DONE])}),
    ("delivery_due", "main gets it now", "", {"event": event(deliveries=[delivery()])}),
    ("delivery_due", "main gets it at 14:35", "",
     {"event": event(deliveries=[delivery(next_attempt_at=LATER)])}),
    ("delivery_under_way", "main is getting it now", "",
     {"event": event(deliveries=[delivery(attempts=1, next_attempt_at=LATER)])}),
    ("delivery_failing", "14:02: queue full; 312 others wait for the same reason; next attempt at 14:35",
     f"receiver deliveries show {ID}",
     {"event": event(deliveries=[FAILING]),
      "destinations": [DestinationFacts(name="main", failures=failures())]}),
    ("delivery_failing", "main has failed since 14:02: queue full; 1 other waits for the same reason",
     "receiver deliveries failures --destination main",
     {"event": event(deliveries=[FAILING]),
      "destinations": [DestinationFacts(name="main", failures=failures(count=2))]}),
    ("destination_down", "main has been down since 14:02: connection refused; only probes are sent",
     "receiver deliveries failures --destination main",
     {"event": event(deliveries=[delivery()]),
      "destinations": [DestinationFacts(name="main", circuit=Circuit(
          destination="main", process=ID, owner="web-1:41", open_since=AT,
          error="PublishFailed: connection refused"))]}),
    ("destination_paused", "main has been paused since 14:02 by ops: their deploy",
     "receiver destinations resume main",
     {"event": event(deliveries=[delivery()]),
      "destinations": [DestinationFacts(name="main", pause=Pause(at=AT, by="ops", reason="their deploy"))]}),
    ("destination_unserved", "no running worker delivers to main", "receiver check",
     {"event": event(deliveries=[delivery()]), "workers": [worker([FAN_OUT_LANE])]}),
    ("no_worker", "no worker is running that delivers to main", "receiver worker",
     {"event": event(deliveries=[delivery()]), "workers": ()}),
    ("destination_removed", "main is not configured any more", "receiver deliveries move main NEW",
     {"event": event(deliveries=[delivery()]), "destinations": ()}),
    ("delivery_dead", "dead letter since 14:02: queue full; 312 others are dead for the same reason",
     f"receiver deliveries retry {ID}",
     {"event": event(deliveries=[DEAD]),
      "destinations": [DestinationFacts(name="main", failures=failures("dead"))]}),
    ("delivery_canceled", "was canceled: discarded by ops", "",
     {"event": event(deliveries=[delivery("canceled", error="discarded by ops")])}),
    ("delivered", "cost 40 credits; delivered to main at 14:02", "", {"event": event(deliveries=[DONE])}),
    ("delivered", "delivered to main", "",
     {"event": event(deliveries=[DEAD, DONE | {"id": OTHER_ID, "replay_id": ID}])}),
    ("delivered", "delivered to main", "",
     {"event": event(deliveries=[DONE, DEAD | {"id": OTHER_ID, "replay_id": ID}])}),
    ("delivery_dead", "dead letter", f"receiver deliveries retry {ID}",
     {"event": event(deliveries=[DEAD, DONE | {"id": OTHER_ID, "replay_id": ID}]), "delivery_id": ID}),
    ("conflict", "another body came later", f"receiver events show {ID}",
     {"event": event(deliveries=[DONE], receipts=[receipt("accepted"), receipt("conflict")])}),
    ("conflict", "another body came later", f"receiver events promote {ID} 0 --dry-run",
     {"event": event(deliveries=[DONE], receipts=[receipt("accepted"), receipt("conflict")])}),
    ("delivered", "delivered to main", "",
     {"event": event(deliveries=[OLD, DONE | {"id": OTHER_ID, "replay_id": ID}],
                     receipts=[receipt("promoted"), receipt("superseded")])}),
    ("delivery_dead", "main has not got it", "receiver deliveries retry",
     {"event": event(deliveries=[OLD, DEAD | {"id": OTHER_ID, "replay_id": ID}])}),
    ("delivery_due", "main gets the promoted body by a replay next", "receiver replays list",
     {"event": event(deliveries=[OLD])}),
    ("filtered", "main does not get the promoted body: its filter leaves it out (status is 'ERROR')", "",
     {"event": event(deliveries=[OLD]),
      "destinations": [DestinationFacts(name="main", mismatch="status is 'ERROR'")]}),
    ("filtered", "gone is not configured any more", "",
     {"event": event(deliveries=[OLD | {"destination": "gone"}])}),
    ("delivered", "delivered to main", "", {"event": event(deliveries=[OLD]), "delivery_id": ID}),
    ("filtered", "main: status is 'OK', the filter allows 'ERROR'", f"receiver route {ID}",
     {"event": event(), "destinations": [
         DestinationFacts(name="main", mismatch="status is 'OK', the filter allows 'ERROR'")]}),
    ("filtered", "main took no such events when it came", f"receiver replay {ID}", {"event": event()}),
    ("stored", "no destination is configured", "", {"event": event(), "destinations": ()}),
    ("unknown", "no event, job, delivery, file or rejected request has this id",
     "receiver rejections list", {}),
    ("unknown", "never arrived", "receiver events fetch r-1", {}),
]  # fmt: skip


def explained(**values: Any) -> Explanation:
    """Explain facts; a worker runs, and `main` is configured."""
    known: dict[str, Any] = {"key": "r-1", "now": NOW, "workers": [WORKER], "destinations": [MAIN]}
    return explain(Facts(**known | values))


@pytest.mark.parametrize(("state", "words", "command", "values"), CASES, ids=[case[0] for case in CASES])
def test_each_state_is_explained(state: State, words: str, command: str, values: Mapping[str, Any]) -> None:
    """The verdict names the state and its reason, and the next command is among the commands."""
    found = explained(**values)
    assert (found["state"], words in found["verdict"]) == (state, True), found
    assert any(each.startswith(command) for each in found["commands"]) or not command, found
    times = [fact["at"] for fact in found["facts"]]
    assert times == sorted(times)


def test_every_state_has_a_case_and_one_outcome() -> None:
    """No state lacks its case, its outcome or its exit status."""
    states = set(get_args(State))
    assert {case[0] for case in CASES} == states
    listed = [state for each in OUTCOMES.values() for state in each]
    assert (len(listed), set(listed)) == (len(states), states)
    assert STATUSES.keys() == set(get_args(Outcome)) == OUTCOMES.keys()
    assert len(set(STATUSES.values())) == len(STATUSES)


def test_the_most_urgent_state_is_shown_first() -> None:
    """A dead letter at one destination counts for more than a failure or a success at others."""
    rows = [
        DONE,
        FAILING | {"id": OTHER_ID, "destination": "slow"},
        DEAD | {"id": UUID(int=9), "destination": "strict"},
    ]
    names = ("main", "slow", "strict")
    lanes = [*LANES, destination_lane("slow"), destination_lane("strict")]
    found = explained(
        event=event(deliveries=rows, media=[file("stored")]),
        job=job("completed", charged=40, request_id="r-1"),
        destinations=[DestinationFacts(name=name) for name in names],
        workers=[worker(lanes)],
    )
    assert (found["state"], found["outcome"]) == ("delivery_dead", "needs_action")
    assert found["verdict"] == (
        "paid 40 credits, video stored; strict has not got it: dead letter since 14:02: queue full; "
        "slow has failed: queue full; next attempt at 14:35; delivered to main at 14:02"
    )


def test_a_failed_generation_is_delivered_as_such() -> None:
    """The verdict of a failed generation has Clipia's reason."""
    failed = job("failed", charged=0, request_id="r-1", error=error("content_policy"))
    found = explained(event=event(status="ERROR", deliveries=[DONE]), job=failed)
    assert found["outcome"] == "delivered"
    assert "the generation failed (content_policy: words)" in found["verdict"]


def test_a_command_is_safe_to_paste() -> None:
    """An id from a stranger is quoted for the shell in the next command."""
    (*_, command) = explained(key="r-1; rm -rf '~'", event=None)["commands"]
    assert command == "receiver events fetch 'r-1; rm -rf '\\''~'\\'''"
