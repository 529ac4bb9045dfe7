"""Private parts of the client libraries, in one place: an upgrade of a library may change any of them.

Each function says which gap of the public interface it fills.
"""

import asyncio
import contextlib
from typing import Any


def abort_nats_transport(transport: Any) -> None:
    """Close the TCP socket of a NATS client at once: `close` waits until the server has read everything."""
    if transport._io_writer is not None:
        transport._io_writer.transport.abort()


def count_kafka_replicas(cluster: Any, topic: str) -> int:
    """Return the number of replicas of the partition that has the fewest; no public method returns it."""
    return min(len(partition.replicas) for partition in cluster._partitions[topic].values())


async def close_kafka_producer(producer: Any, *, seconds: float) -> None:
    """Disconnect a producer; each of the two steps may take `seconds`.

    The library's `stop` first sends all records that wait, for as long as that takes.
    """
    if producer._closed:
        return
    # The library warns of a producer that is not marked as closed.
    producer._closed = True
    sender = producer._sender.sender_task
    if sender is not None:
        sender.cancel()
    for connection in list(producer.client._conns.values()):
        # A clean end would wait until the broker has read everything, and a broker that hangs never does.
        if connection._writer is not None:
            connection._writer.transport.abort()
        connection.close()
    if sender is not None:
        # It ends after its requests, which have failed with their connections.
        await asyncio.wait([sender], timeout=seconds)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await producer.client.close()
