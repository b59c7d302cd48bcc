"""A headless browser for tests, driven by the W3C WebDriver protocol: what a reader sees and clicks, without a package.

`Browser.start()` returns None where no Chromium with its driver is installed.
"""

import base64
import json
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

PATIENCE = 60  # seconds, for a busy machine
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of an element in WebDriver messages


class Browser:
    """One window of one browser."""

    def __init__(self, driver: subprocess.Popen, port: int, chromium: str) -> None:
        self._driver = driver
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._root = f"http://127.0.0.1:{port}"
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        arguments += ["--disable-background-networking", "--window-size=1400,900"]
        arguments.append(f"--user-data-dir={self._profile.name}")
        options = {"binary": chromium, "args": arguments}
        logging = {"goog:loggingPrefs": {"browser": "ALL"}, "goog:chromeOptions": options}
        session = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": {"browserName": "chrome", **logging}}})
        self._root += f"/session/{session['sessionId']}"

    @classmethod
    def start(cls) -> "Browser | None":
        """A browser, or None if there is none on this machine."""
        chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        driver = shutil.which("chromedriver")
        if chromium is None or driver is None:
            return None
        process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        # "ChromeDriver was started successfully on port 40123."
        port = next(
            (line.rstrip(".\n").rsplit(" ", 1)[1] for line in process.stdout if "successfully on port" in line), None
        )
        if port is None:
            return None
        return cls(process, int(port), chromium)

    def close(self) -> None:
        """End the browser and its driver."""
        try:
            self._ask("DELETE", "")
        finally:
            self._driver.terminate()
            self._driver.wait(timeout=PATIENCE)
            self._driver.stdout.close()
            self._profile.cleanup()

    def open(self, url: str) -> None:
        """Load a page."""
        self._ask("POST", "/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a piece of JavaScript returns."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def click(self, selector: str) -> None:
        """A real click in the middle of the element, which fails if something covers it."""
        self._ask("POST", f"/element/{self._find(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        """Type into a field."""
        self._ask("POST", f"/element/{self._find(selector)}/value", {"text": text})

    def press(self, key: str) -> None:
        """Press a key, wherever the focus is."""
        keys = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        self._ask("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": keys}]})

    def resize(self, width: int, height: int) -> None:
        """Another size of the window, in CSS pixels."""
        self._ask("POST", "/window/rect", {"width": width, "height": height})

    def screenshot(self, file: Path) -> None:
        """What is seen, as PNG."""
        file.write_bytes(base64.b64decode(self._ask("GET", "/screenshot")))

    def print(self, file: Path) -> None:
        """The page as it is printed, as PDF."""
        file.write_bytes(base64.b64decode(self._ask("POST", "/print", {"background": True})))

    def errors(self) -> list[str]:
        """Messages of the console since the last call."""
        return [entry["message"] for entry in self._ask("POST", "/se/log", {"type": "browser"})]

    def _find(self, selector: str) -> str:
        return self._ask("POST", "/element", {"using": "css selector", "value": selector})[ELEMENT]

    def _ask(self, verb: str, path: str, body: dict[str, Any] | None = None) -> Any:
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._root + path, content, {"Content-Type": "application/json"}, method=verb)
        end = time.monotonic() + PATIENCE
        while True:
            try:
                with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                    return json.load(answer)["value"]
            except urllib.error.HTTPError as error:
                value = json.load(error)["value"]
                raise RuntimeError(f"{verb} {path}: {value['error']}: {value['message']}") from error
            except ConnectionRefusedError:
                if time.monotonic() > end:
                    raise
