"""A headless Chromium that is driven through a pipe, where one is installed."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))),
    None,
)
_CUT_OFF = """
[...document.querySelectorAll("main *, .banner")].filter(e => {
  const box = e.getBoundingClientRect();
  const scrolls = e.closest(".scroll, .wide:not(.whole), details:not([open])");
  return !scrolls && !e.closest("svg") && box.width > 0 && box.right > innerWidth + 1;
}).map(e => e.tagName + "." + e.className).slice(0, 5)
"""
_OVERLAPS = """
[...document.querySelectorAll(".plot")].flatMap(plot => {
  const texts = [...plot.querySelectorAll("svg text")].filter(t => t.textContent.trim());
  const boxes = texts.map(t => [t.textContent, t.getBoundingClientRect()]);
  const numbers = [...plot.querySelectorAll(".textpoint text")].filter(t => t.textContent.trim());
  const points = [...plot.querySelectorAll(".points path.point")].map(p => p.getBoundingClientRect());
  const found = numbers.filter(t => {
    const q = t.getBoundingClientRect();
    return points.some(p => Math.min(p.right, q.right) - Math.max(p.left, q.left) > 2
      && Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top) > 3);
  }).map(t => t.textContent + " / a point");
  boxes.forEach(([a, p], i) => boxes.slice(i + 1).forEach(([b, q]) => {
    const wide = Math.min(p.right, q.right) - Math.max(p.left, q.left);
    const high = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
    if (wide > 2 && high > 3) found.push(a + " / " + b);
  }));
  return found;
}).slice(0, 8)
"""


class Browser:
    """One page of a Chromium."""

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read, self._buffer = write, read, b""
        self._number, self._session = 0, ""
        self.events: list[dict[str, Any]] = []
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._ask(f"{domain}.enable")

    def _ask(self, method: str, **params: Any) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            piece = os.read(self._read, 1 << 20)
            assert piece, "Chromium has ended"
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def open(self, path: Path, *, width: int, dark: bool = False, height: int = 900) -> None:
        """Show a page at a width, and wait until its plots are drawn."""
        self.events.clear()
        self._ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", features=[scheme])
        self._ask("Page.navigate", url=path.absolute().as_uri())
        deadline = time.monotonic() + 60
        while self.value("document.documentElement.dataset.drawn") != "yes":
            assert time.monotonic() < deadline, self.problems
            time.sleep(0.05)
        self.value("new Promise(done => setTimeout(done, 300))")

    def value(self, expression: str) -> Any:
        """Return what an expression comes to on the page."""
        result = self._ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        return result["result"].get("value")

    @property
    def problems(self) -> list[str]:
        """Errors of the console, and requests for anything but the page itself."""
        found = []
        for event in self.events:
            params = event.get("params", {})
            match event.get("method"):
                case "Runtime.exceptionThrown":
                    found.append(json.dumps(params["exceptionDetails"])[:300])
                case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning"):
                    found.append(json.dumps(params["args"])[:300])
                case "Log.entryAdded" if params["entry"]["level"] == "error":
                    found.append(params["entry"]["text"])
                case "Network.requestWillBeSent" if not params["request"]["url"].startswith(
                    ("file:", "data:", "blob:")
                ):
                    found.append(params["request"]["url"])
        return found

    @property
    def cut_off(self) -> list[str]:
        """Elements that reach beyond the window and do not scroll."""
        return list(self.value(_CUT_OFF))

    @property
    def overlaps(self) -> list[str]:
        """Texts of plots that lie over each other, and numbers of trials that lie over points."""
        return list(self.value(_OVERLAPS))

    @property
    def height(self) -> int:
        """Of the whole page, in pixels."""
        return int(self.value("document.documentElement.scrollHeight"))

    def screenshot(self, path: Path, *, height: int | None = None) -> None:
        """Write the page as a picture, from its top."""
        width = self.value("innerWidth")
        clip = {"x": 0, "y": 0, "width": width, "height": height or self.height, "scale": 1}
        taken = self._ask("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(taken["data"]))


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """Start Chromium with a profile of its own."""
    assert CHROMIUM is not None
    to_read, to_write = os.pipe()
    from_read, from_write = os.pipe()

    def pipes() -> None:
        a, b = os.dup(to_read), os.dup(from_write)
        os.dup2(a, 3)
        os.dup2(b, 4)

    process = subprocess.Popen(
        [
            CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            f"--user-data-dir={profile}", "--remote-debugging-pipe",
        ],
        preexec_fn=pipes,
        close_fds=False,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(to_read)
    os.close(from_write)
    try:
        yield Browser(to_write, from_read)
    finally:
        process.kill()
        process.wait()
        os.close(to_write)
        os.close(from_read)
