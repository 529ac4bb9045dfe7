"""A browser for the tests of pages."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from support.browser import Browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Browser]":
    """One Chromium for all tests of the file."""
    from support.browser import Browser  # noqa: PLC0415 - most tests need no Playwright

    with Browser(tmp_path_factory.getbasetemp()) as started:
        yield started
