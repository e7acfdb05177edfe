"""A headless Chromium driven over its DevTools pipe, as a person would: keys, mouse, and what the screen shows.

The pipe is two file descriptors with JSON between null bytes, so no driver package and no port are needed.
"""

import base64
import io
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time

BINARY = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
# The browser reads commands from descriptor 3 and answers on 4.
_START = """
import fcntl, os, sys
for place, number in enumerate([fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]], 3):
    os.dup2(number, place)
os.execv(sys.argv[3], sys.argv[3:])
"""
_KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "End": 35, "Home": 36, "Tab": 9}


class Browser:
    """One page in one browser, closed at the end of a `with`.

    Args:
        profile: an empty folder for what the browser writes.
    """

    def __init__(self, profile):
        its_read, self._write = os.pipe()
        self._read, its_write = os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        flags += ["--remote-debugging-pipe", f"--user-data-dir={profile}", "--disable-background-networking"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, str(its_read), str(its_write), BINARY, *flags, "about:blank"],
            pass_fds=(its_read, its_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(its_read)
        os.close(its_write)
        self._numbers, self._rest, self._session = itertools.count(1), b"", None
        self.complaints, self.requests = [], []
        self._loaded = False
        (target,) = [t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        try:
            self._session = None
            self.call("Browser.close")
            self._process.wait(20)
        finally:
            self._process.kill()
            self._process.wait()
            os.close(self._read)
            os.close(self._write)

    def call(self, method, **arguments):
        """A DevTools method's result."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": arguments}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _message(self, seconds=60):
        while b"\0" not in self._rest:
            assert select.select([self._read], [], [], seconds)[0], "the browser says nothing"
            piece = os.read(self._read, 1 << 20)
            assert piece, "the browser has ended"
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(line)
        self._notice(message.get("method"), message.get("params"))
        return message

    def _notice(self, method, told):
        if method == "Runtime.exceptionThrown":
            self.complaints.append(told["exceptionDetails"].get("exception", told)["description"])
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(f"console.{told['type']}: {told['args']}")
        elif method == "Log.entryAdded":
            self.complaints.append(told["entry"]["text"])
        elif method == "Page.javascriptDialogOpening":
            self.complaints.append(f"dialog: {told['message']}")
        elif method == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif method == "Page.loadEventFired":
            self._loaded = True

    def size(self, width, height=900):
        """Set the window's size."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def open(self, url):
        """Load a page; complaints and requests are its own from here on."""
        self.complaints, self.requests, self._loaded = [], [], False
        error = self.call("Page.navigate", url=str(url)).get("errorText")
        assert not error, error
        while not self._loaded:
            self._message()

    def js(self, expression):
        """The value of an expression, awaited where it is a promise."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, expression, seconds=30):
        """Wait until an expression is true, looked at whenever the page draws."""
        deadline = time.monotonic() + seconds
        while not self.js(f"new Promise((go) => requestAnimationFrame(() => go(Boolean({expression}))))"):
            assert time.monotonic() < deadline, f"not so after {seconds} s: {expression}"

    def press(self, key, times=1):
        """Press a key on whatever has the focus."""
        for _ in range(times):
            for kind in ("keyDown", "keyUp"):
                self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=_KEYS[key])

    def point(self, x, y, press=False):
        """Move the mouse to a place on the screen, and click there."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased") if press else ():
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def screen(self, whole=False):
        """What is shown, as PNG; `whole`: with what lies below the window."""
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"])

    def pixels(self):
        """What is shown, `[height, width, 3]`, 0 to 255."""
        from matplotlib.image import imread

        return (imread(io.BytesIO(self.screen()), format="png")[..., :3] * 255).round().astype(int)
