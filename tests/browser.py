"""A headless Chromium, driven through its DevTools protocol; aiohttp, which `datasets` brings, speaks to it.

GEMMA_TUNE_TEST_BROWSER   the program (default: chromium, chromium-browser or google-chrome on the path)
"""

from __future__ import annotations

import asyncio
import base64
import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def browser() -> str | None:
    """Path of a Chromium; None where there is none."""
    named = os.environ.get("GEMMA_TUNE_TEST_BROWSER")
    return named or next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One tab. `events` are those that came, by method."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._number = 0
        self.events: list[tuple[str, dict[str, Any]]] = []

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": params})
        while True:
            message = await self._socket.receive_json(timeout=20)
            if message.get("id") == self._number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return dict(message["result"])
            self.events.append((message["method"], message.get("params", {})))

    async def value(self, expression: str) -> Any:
        """What a JavaScript expression is, as JSON."""
        found = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"])
        return found["result"].get("value")

    async def open(self, url: str) -> None:
        await self.call("Page.navigate", url=url)
        while await self.value("document.readyState") != "complete" or await self.value("location.href") != url:
            await asyncio.sleep(0.02)

    async def look(self, width: int, height: int = 800, *, dark: bool = False, scale: float = 1.0) -> None:
        """Emulate a window of `width` x `height`, and what the system says of colours."""
        mobile = width < 600
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=mobile
        )
        wishes = {"prefers-color-scheme": "dark" if dark else "light", "prefers-reduced-motion": "reduce"}
        features = [{"name": name, "value": value} for name, value in wishes.items()]
        await self.call("Emulation.setEmulatedMedia", features=features)

    async def picture(self, path: Path, **clip: float) -> None:
        """The whole page, or `clip` (x, y, width, height) of it, as PNG."""
        more: dict[str, Any] = {"clip": {**clip, "scale": 1}} if clip else {}
        found = await self.call("Page.captureScreenshot", captureBeyondViewport=True, **more)
        path.write_bytes(base64.b64decode(found["data"]))


@asynccontextmanager
async def open_browser() -> AsyncIterator[Page]:
    """A tab of a fresh browser with an own, empty profile; ended and removed afterwards.

    Raises:
        FileNotFoundError: there is no Chromium.
    """
    program = browser()
    if program is None:
        raise FileNotFoundError("no Chromium")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage")
        words = [program, *options, "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port = await _port(Path(profile) / "DevToolsActivePort", process)
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json") as answer:
                    tabs = await answer.json(content_type=None)
                address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
                async with session.ws_connect(address, max_msg_size=0) as socket:
                    yield Page(socket)
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)


async def _port(file: Path, process: subprocess.Popen[bytes]) -> int:
    for _ in range(600):
        if file.is_file() and (text := file.read_text()).count("\n"):
            return int(text.splitlines()[0])
        if process.poll() is not None:
            raise RuntimeError(f"the browser ended at once, with code {process.returncode}")
        await asyncio.sleep(0.05)
    raise TimeoutError("the browser opened no port within 30 seconds")
