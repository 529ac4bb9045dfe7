"""`receiver check` and the log."""

from collections.abc import Iterator

import pytest
import structlog
from structlog.testing import capture_logs

from receiver.destination_control import collected_problems


@pytest.fixture(params=["before", "inside"])
def logger(request: pytest.FixtureRequest) -> Iterator[str]:
    """Loggers that keep their processors from their first record on, as the commands configure them."""
    structlog.configure(cache_logger_on_first_use=True)
    yield request.param
    structlog.configure(cache_logger_on_first_use=False)


def test_problems_are_collected_in_the_block_only(logger: str) -> None:
    """Records inside the block are captured, even of loggers that were used before; later records are not."""
    log = structlog.get_logger()
    if logger == "before":
        log.debug("first line")
    with collected_problems() as problems:
        log.warning("odd", problem="no replica")
        log.warning("odd", problem="no replica")
        log.info("something else")
    assert problems == ["no replica"]
    with capture_logs() as logs:
        log.warning("odd", problem="another one")
    assert (problems, len(logs)) == (["no replica"], 1)
