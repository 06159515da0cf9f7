"""The app as a subprocess on a free port, and a browser that remembers what went wrong and what was asked from outside."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import pytest

START_S = 90  # until the real page answers, on a busy machine
SHOTS = Path(__file__).parent / "screenshots"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--no-first-run"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answer(url: str):
    """(is it the real page, its text), or None if nothing answers."""
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return "X-Starting" not in reply.headers, reply.read().decode()
    except OSError:
        return None


class Running:
    """The started app: its address and how long its first answer took."""

    def __init__(self, root: Path, runs: Path, *command: str):
        port = free_port()
        command = [part.format(port=port) for part in command or ("app.py", "--port", "{port}")]
        self.url = f"http://127.0.0.1:{port}"
        env = os.environ | {"ADATSQ_RUNS": str(runs), "GRADIO_TEMP_DIR": str(runs / "gradio")}
        started = time.monotonic()
        self.process = subprocess.Popen([sys.executable, *command], cwd=root, env=env, start_new_session=True,
                                        stdout=subprocess.DEVNULL, stderr=(runs / "stderr.txt").open("wb"))
        self._until(lambda: answer(self.url))
        self.first_answer_s = time.monotonic() - started
        self._until(lambda: (answer(self.url) or (False,))[0])

    def _until(self, ready) -> None:
        limit = time.monotonic() + START_S
        while not ready():
            if self.process.poll() is not None or time.monotonic() > limit:
                raise RuntimeError(f"the app did not start (exit status {self.process.poll()})")
            time.sleep(0.05)

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait(20)


@pytest.fixture(scope="session")
def app(root, tmp_path_factory):
    running = Running(root, tmp_path_factory.mktemp("runs"))
    yield running
    running.stop()


@pytest.fixture(scope="session")
def fake_app(root, tmp_path_factory):
    """The real page on made-up numbers: each report of a stage takes 20 ms."""
    running = Running(root, tmp_path_factory.mktemp("runs"), "tests/ui/fake_app.py", "{port}", "0.02")
    yield running
    running.stop()


@pytest.fixture(scope="session")
def chrome(chromium):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


def watched(opened):
    """The page, collecting in `errors` and `outside` what must stay empty."""
    opened.errors, opened.outside = [], []
    opened.on("console", lambda m: opened.errors.append(m.text) if m.type == "error" else None)
    opened.on("pageerror", lambda e: opened.errors.append(str(e)))
    opened.on("request", lambda r: opened.outside.append(r.url) if urlsplit(r.url).hostname not in ("127.0.0.1", None) else None)
    return opened


@pytest.fixture(scope="module")
def page(chrome, app):
    """One page for a module's tests."""
    opened = watched(chrome.new_page(viewport={"width": 1440, "height": 900}))
    opened.set_default_timeout(60_000)
    opened.goto(app.url)
    opened.wait_for_selector("#status")
    yield opened
    opened.close()


@pytest.fixture
def visit(chrome, fake_app):
    """Open the page on made-up numbers as a new visitor: visit(width=…, height=…, dark=…, query=…). What goes wrong fails the test."""
    contexts, pages = [], []

    def open_page(width=1440, height=900, dark=False, query=""):
        context = chrome.new_context(viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light")
        contexts.append(context)
        opened = watched(context.new_page())
        pages.append(opened)
        opened.set_default_timeout(60_000)
        opened.goto(fake_app.url + query)
        opened.wait_for_function("document.querySelector('#status')?.innerText.includes('ready')")
        return opened

    yield open_page
    found = [(opened.errors, opened.outside) for opened in pages]
    for context in contexts:
        context.close()
    assert found == [([], [])] * len(pages)


@pytest.fixture(scope="session")
def shoot():
    """Keep a picture of a screen."""
    SHOTS.mkdir(exist_ok=True)

    def take(page, name):
        page.screenshot(path=SHOTS / f"{name}.png", full_page=True)
    return take
