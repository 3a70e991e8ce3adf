"""A real Chromium without a window, driven through chromedriver's HTTP interface (WebDriver).

No package is needed for it, only the programs `chromium` and `chromedriver`.
"""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
MISSING = "" if CHROMIUM and DRIVER else "needs the programs chromium and chromedriver"
_ARGUMENTS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]


class Browser:
    """A session of chromedriver."""

    def __init__(self, address: str) -> None:
        self.address = address
        options = {"binary": CHROMIUM, "args": _ARGUMENTS}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        made = self._send("session", {"capabilities": {"alwaysMatch": wanted}})
        self.session = f"session/{made['sessionId']}"

    def open(self, page: Path, width: int, *, dark: bool = False) -> None:
        """Show a file in a window of this width, in CSS pixels."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.devtools("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", features=[scheme])
        self._send(f"{self.session}/url", {"url": page.as_uri()})

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        body = {"script": f"return {script}", "args": []}
        return self._send(f"{self.session}/execute/sync", body)

    def console(self) -> list[dict[str, Any]]:
        """What the page had the browser log since the last call."""
        found: list[dict[str, Any]] = self._send(f"{self.session}/se/log", {"type": "browser"})
        return found

    def picture(self) -> bytes:
        """The whole page as a PNG."""
        shot = self.devtools("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        return base64.b64decode(shot["data"])

    def pdf(self) -> bytes:
        """The page as it is printed."""
        return base64.b64decode(self._send(f"{self.session}/print", {}))

    def devtools(self, command: str, **parameters: Any) -> Any:
        """A command of the DevTools protocol."""
        body = {"cmd": command, "params": parameters}
        return self._send(f"{self.session}/goog/cdp/execute", body)

    def close(self) -> None:
        """End the session."""
        self._send(self.session, None, "DELETE")

    def _send(self, path: str, body: Any, method: str = "POST") -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.address}/{path}", data, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from None


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A browser, which is ended with the block."""
    assert DRIVER is not None
    driver = subprocess.Popen(
        [DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert driver.stdout is not None
        line = next(text for text in driver.stdout if "port" in text and text.strip()[-2].isdigit())
        made = Browser(f"http://127.0.0.1:{line.rstrip().rstrip('.').split()[-1]}")
        try:
            yield made
        finally:
            made.close()
    finally:
        driver.terminate()
        driver.wait(10)
        if driver.stdout is not None:
            driver.stdout.close()
