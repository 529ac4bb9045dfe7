"""A real Chromium that fails a test on console errors, requests to other hosts, and findings of axe."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal, Self
from urllib.parse import urlsplit

from playwright.sync_api import BrowserContext, Dialog, Page, Request, sync_playwright

from support.npm import install
from support.servers import missing

AXE: Final = "axe-core@4.14.1"
WIDE: Final = (1280, 900)
PHONE: Final = (390, 844)
Scheme = Literal["light", "dark"]


def find_chromium() -> str:
    """Return the path of Debian's Chromium; without it the test skips, or fails in CI."""
    found = shutil.which("chromium")
    if found is None:
        missing("Chromium", "apt-get install chromium")
        raise AssertionError("unreachable")
    return found


@cache
def _axe(cache_folder: Path) -> str:
    source = install(cache_folder, AXE) / "node_modules" / "axe-core" / "axe.min.js"
    return source.read_text(encoding="utf-8")


class Browser:
    """One browser; each `window` is a person with a profile of its own."""

    def __init__(self, axe_cache: Path) -> None:
        self._axe_cache = axe_cache

    def __enter__(self) -> Self:
        self._playwright = sync_playwright().start()
        self._browser = self._playwright.chromium.launch(executable_path=find_chromium())
        return self

    def __exit__(self, *_error: object) -> None:
        self._browser.close()
        self._playwright.stop()

    @contextmanager
    def window(
        self, url: str, *, size: tuple[int, int] = WIDE, scheme: Scheme = "light", scripts: bool = True
    ) -> Iterator["Window"]:
        """Open a window on the receiver at `url`; at its end, no fault must have been seen in it."""
        context = self._browser.new_context(
            base_url=url,
            viewport={"width": size[0], "height": size[1]},
            color_scheme=scheme,
            java_script_enabled=scripts,
        )
        context.set_default_timeout(15_000)
        window = Window(context, url, self._axe_cache)
        try:
            yield window
            assert not window.faults, window.faults
        finally:
            context.close()


class Window:
    """A window with one page."""

    def __init__(self, context: BrowserContext, url: str, axe_cache: Path) -> None:
        self.faults: list[str] = []
        """Messages of the console, errors of scripts, and requests to other hosts."""
        self._host = urlsplit(url).netloc
        self._axe_cache = axe_cache
        self.page: Page = context.new_page()
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.faults.append(f"script: {error}"))
        self.page.on("request", self._request)
        self.page.on("dialog", self._dialog)

    def _console(self, message: Any) -> None:
        if message.type in ("error", "warning") or "Content Security Policy" in message.text:
            self.faults.append(f"console: {message.text}")

    def _dialog(self, dialog: Dialog) -> None:
        self.faults.append("a dialog")
        dialog.dismiss()

    def _request(self, request: Request) -> None:
        parts = urlsplit(request.url)
        if parts.scheme not in ("data", "blob") and parts.netloc != self._host:
            self.faults.append(f"request to {parts.netloc}")

    def log_in(self, token: str, *, path: str = "/dashboard") -> Self:
        """Log in and go to a page."""
        self.page.goto(path)
        self.page.get_by_label("API token").fill(token)
        self.page.get_by_role("button", name="Log in").click()
        self.page.wait_for_selector("nav")
        return self

    def assert_accessible(self) -> None:
        """Fail on each finding of axe-core that is serious or critical."""
        # A script tag with it would be refused by the page's policy.
        self.page.evaluate(_axe(self._axe_cache))
        found = self.page.evaluate("async () => (await axe.run()).violations")
        serious = [
            (each["id"], [node["html"] for node in each["nodes"]][:3], each["help"])
            for each in found
            if each["impact"] in ("serious", "critical")
        ]
        assert not serious, serious

    def assert_fits(self) -> None:
        """Fail if the page is wider than the window: tables scroll in themselves."""
        wider = self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        assert wider <= 0, f"{wider} px wider than the window"
