"""What a visitor waits for, in a real browser on this machine: the guided visit, and the answer to a click.

    python benchmarks/screen.py                 # three visits and eight clicks of every kind, some minutes on 2 cores
    python benchmarks/screen.py --visits 1 --clicks 3 --json screen.json

Starts the app and a chromium that draws without a GPU, so both share the machine. A click is answered when the part that shows its
answer first changes; what a script marks before the server has answered is not counted. Prints Markdown; asserts nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from provenance import provenance
from visitors import Server

from workbench.ui.tour import STOPS

BROWSERS = ("chromium", "chromium-headless-shell")
WAIT_MS, REST_MS = 300_000, 800
# Notes when a click comes in and when the watched part first changes after it, both in the page's own clock.
WATCH = """part => {
    window.timing = {};
    window.watching?.disconnect();
    window.watching = new MutationObserver(() => { if (timing.click) timing.answer ??= performance.now(); });
    window.watching.observe(document.querySelector(part), {subtree: true, childList: true, characterData: true});
    addEventListener('click', () => { timing.click ??= performance.now(); }, {capture: true, once: true});
}"""
# On which screen what is clicked, in turns, and the part that answers: what is chosen already answers nothing. Another plan takes the
# images away, so it comes last.
CLICKS = {
    "Compare": ("another pair: its images", "#pair-grid .thumb[aria-pressed=false]", "#viewer .caption"),
    "Sensitivity": ("a row of the tables: its layer and step", "#cells tbody tr[aria-pressed=false]", "#cell-detail"),
    "Search": ("a plan of the table: its costs", "#plan-table tbody tr[aria-pressed=false]", "#plan-numbers"),
}
EXPORT = ("Export: what it does now", "#export", "#status")


def open_page(browser, url: str):
    page = browser.new_context(viewport={"width": 1440, "height": 900}).new_page()
    page.set_default_timeout(WAIT_MS)
    page.goto(url)
    page.wait_for_function("document.querySelector('#status')?.innerText.includes('ready')")
    return page


def guided_visit(page) -> dict[str, float]:
    """Seconds from each of the four buttons to its tick."""
    taken = {}
    for number, stop in enumerate(STOPS):
        started = time.monotonic()
        page.locator(".guide li.next").first.get_by_role("button").click()
        page.wait_for_selector(f".guide li.done >> nth={number}")
        taken[stop.job] = time.monotonic() - started
    return taken


def answer_ms(page, target: str, part: str) -> float:
    page.evaluate(WATCH, part)
    page.locator(target).click()
    page.wait_for_function("timing.answer")
    return page.evaluate("timing.answer - timing.click")


def click_around(page, count: int) -> dict[str, list[float]]:
    """Milliseconds of every kind of click."""
    found = {}
    for screen, (name, target, part) in CLICKS.items():
        page.get_by_role("tab", name=screen, exact=True).click()
        page.wait_for_timeout(2 * REST_MS)
        offered = page.locator(target).count()
        for turn in range(count if offered > 1 else 0):
            found.setdefault(name, []).append(answer_ms(page, f"{target} >> nth={(turn + 1) % offered}", part))
            page.wait_for_timeout(REST_MS)
    return found


def exports(page, count: int) -> list[float]:
    page.get_by_role("tab", name="Export", exact=True).click()
    taken = []
    for _ in range(count):
        page.wait_for_selector(f"{EXPORT[1]}:not([disabled])")
        page.wait_for_timeout(REST_MS)
        taken.append(answer_ms(page, *EXPORT[1:]))
        page.wait_for_function("document.querySelector('#status').innerText.includes('export: done')")
    return taken


def measure(visits: int, clicks: int, folder: Path) -> dict:
    server = Server(folder)
    try:
        with sync_playwright() as driver:
            path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
            browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
            taken = []
            for _ in range(visits):
                page = open_page(browser, server.url)
                taken.append(guided_visit(page))
            at_rest = click_around(page, clicks) | {EXPORT[0]: exports(page, clicks)}
            page.get_by_role("tab", name="Search", exact=True).click()
            page.click("#search")
            page.wait_for_selector("#plan-table tbody tr >> nth=1")
            searching = click_around(page, clicks)
            when = "after a search began" if "done" in page.inner_text("#status") else "while a search runs"
            browser.close()
    finally:
        server.stop()
    return {"visits_s": taken, "clicks_ms": {"at rest": at_rest, when: searching}}


def markdown(result: dict) -> str:
    lines = ["# What a visitor waits for", "", "Seconds of the guided visit, from each button to its tick:", "",
             f"| visit | {' | '.join(stop.job for stop in STOPS)} | all four |", "|---|" + "---:|" * (len(STOPS) + 1)]
    for number, taken in enumerate(result["visits_s"], 1):
        lines.append(f"| {number} | {' | '.join(f'{seconds:.1f}' for seconds in taken.values())} | {sum(taken.values()):.1f} |")
    lines += ["", "Milliseconds from a click to the first change of what answers it:", "",
              "| click | when | median | max | n |", "|---|---|---:|---:|---:|"]
    for when, kinds in result["clicks_ms"].items():
        lines += [f"| {name} | {when} | {statistics.median(ms):.0f} | {max(ms):.0f} | {len(ms)} |" for name, ms in kinds.items()]
    return "\n".join([*lines, "", *provenance("screen.py", sys.argv[1:])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--visits", type=int, default=3, help="guided visits, one after the other, each with a session of its own")
    parser.add_argument("--clicks", type=int, default=8, help="clicks of each kind")
    parser.add_argument("--json", help="write everything measured to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="screen-") as folder:
        result = measure(args.visits, args.clicks, Path(folder))
    print(markdown(result))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
