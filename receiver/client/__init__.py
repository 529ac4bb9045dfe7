"""A typed client of the internal API; the commands are views over it.

::

    async with Client("https://receiver.internal", token) as client:
        page = await client.list_events(state="ready", limit=10)
        for event in page.data:
            print(event["request_id"])

Each method is one operation of `/openapi.json` and has its name, and its keyword arguments are the call's
parameters. Errors are those that the receiver raised: RequestError with the API's `code`, ClipiaUnavailable,
DatabaseUnavailable and SettingsError. If the receiver gives no answer, the error is ReceiverUnavailable.
"""

from receiver.client.calls import Page
from receiver.client.deliveries import DeliveryCalls
from receiver.client.destinations import DestinationCalls
from receiver.client.inquiries import InquiryCalls
from receiver.client.jobs import CatalogueCalls, JobCalls
from receiver.client.operations import OperationCalls
from receiver.client.rejections import RejectionCalls
from receiver.client.replays import ReplayCalls
from receiver.client.upkeep import UpkeepCalls

__all__ = ["Client", "Page"]


class Client(
    JobCalls,
    CatalogueCalls,
    ReplayCalls,
    UpkeepCalls,
    DeliveryCalls,
    DestinationCalls,
    InquiryCalls,
    RejectionCalls,
    OperationCalls,
):
    """Calls a receiver's internal API. Use it as an async context manager, or call `close`.

    One client may serve many tasks at once.
    """
