"""The whole journey in a real browser on the embedded model, with few steps: load, profile, drill down, search, re-select,
compare, export; and on the way: zoom kept, cancel, re-attach, bad input, nothing that leaves this machine.

The tests run in order and share one page, as a visitor would.
"""

import io
import json
import re
import time
from pathlib import Path
from urllib.parse import urljoin

import numpy as np
import pytest
from PIL import Image

from tests.browser.conftest import watched

pytestmark = pytest.mark.browser

STEPS = 4
PLAN_UPLOAD = "input[data-testid='Import a plan (JSON)-upload-button']"
PROMPTS = "fluent pizza\nnoto anchor"


def tab(page, name):
    page.get_by_role("tab", name=name).click()


def status(page) -> str:
    return page.inner_text("#status .status")


def says(page, selector, text, timeout_s=60):
    """Wait until the text (or pattern) stands there."""
    from playwright.sync_api import expect

    expect(page.locator(selector)).to_contain_text(text, timeout=1000 * timeout_s)


def changes(page, selector, before):
    from playwright.sync_api import expect

    expect(page.locator(selector)).not_to_have_text(before, timeout=15_000)


def until_done(page, kind):
    says(page, "#status", f"{kind}: done", 150)


def type_number(page, selector, value):
    box = page.locator(f"{selector} input[type=number]")
    box.fill(str(value))
    box.blur()


def upload_prompts(page):
    """Replace the table of prompts by a file's."""
    page.set_input_files("#upload-prompts input[type=file], input[data-testid*='Upload prompts']",
                         {"name": "prompts.txt", "mimeType": "text/plain", "buffer": PROMPTS.encode()})
    says(page, "#notice-model", "2 prompts were read")


def layout_range(page, plot, axis="xaxis"):
    return page.evaluate("([plot, axis]) => document.querySelector(plot + ' .plot')._fullLayout[axis].range", [plot, axis])


def cell_spot(page, plot, row, column):
    """Where the middle of a heatmap's cell is on the page."""
    page.locator(plot).scroll_into_view_if_needed()
    return page.evaluate("""([plot, row, column]) => {
        const node = document.querySelector(plot + ' .plot'), full = node._fullLayout, box = node.getBoundingClientRect();
        const names = full.yaxis._categories;
        return [box.x + full.xaxis._offset + full.xaxis.d2p(column), box.y + full.yaxis._offset + full.yaxis.d2p(names[row])];
    }""", [plot, row, column])


def click_cell(page, plot, row, column):
    page.mouse.click(*cell_spot(page, plot, row, column))


def test_a_page_answers_at_once_and_the_model_needs_no_click(app, page, shoot):
    assert app.first_answer_s < 3
    says(page, "#status", "emoji-flux ready")
    assert "exact" in page.inner_text("#summary") and "quantizable" in page.inner_text("#summary")
    assert page.locator("#prompts [role=gridcell]").count() >= 8
    shoot(page, "1-model")


def test_an_unknown_model_is_one_line_beside_the_button(page):
    page.locator("#source input, #source textarea").fill("no/such-model-here")
    page.click("#load")
    page.wait_for_selector("#notice-model .error")
    assert "no/such-model-here" in page.inner_text("#notice-model") and "\n" not in page.inner_text("#notice-model").strip()
    assert "emoji-flux ready" in status(page), "the loaded model is kept"


def test_bad_settings_are_one_line(page):
    type_number(page, "#form-TraceConfig-seed", -5)
    tab(page, "Sensitivity")
    page.click("#profile")
    page.wait_for_selector("#notice-sensitivity .error")
    assert "seed" in page.inner_text("#notice-sensitivity")
    tab(page, "Model")
    type_number(page, "#form-TraceConfig-seed", 0)


def test_a_profile_can_be_cancelled_and_found_again_after_a_reload(page):
    type_number(page, "#form-TraceConfig-steps", 60)
    upload_prompts(page)
    tab(page, "Sensitivity")
    page.click("#profile")
    says(page, "#status", "profile: trace")
    known = len(page.errors)
    page.reload()
    says(page, "#status", re.compile("profile: (trace|sensitivity)"))
    # Gradio's client reports its own requests that the reload aborts; nothing else may be said here.
    page.errors[known:] = [text for text in page.errors[known:] if "AbortError" not in text and "errored out" not in text]
    tab(page, "Sensitivity")
    before = time.monotonic()
    page.click("#cancel-profile")
    page.wait_for_selector("#notice-sensitivity .info")
    assert time.monotonic() - before < 8, "cancelled within a step"
    assert "stopped" in page.inner_text("#notice-sensitivity")


def test_profile_then_drill_down(page, shoot):
    tab(page, "Model")
    type_number(page, "#form-TraceConfig-steps", STEPS)
    upload_prompts(page)
    tab(page, "Sensitivity")
    page.click("#profile")
    until_done(page, "profile")
    page.wait_for_selector("#block-map .heatmaplayer image, #block-map .heatmaplayer g")
    click_cell(page, "#block-map", 3, 1)
    says(page, "#cell-detail", "step 1")
    detail = page.inner_text("#cell-detail")
    assert "single.1" in detail and "standard error" in detail
    page.wait_for_function("document.querySelector('#layer-map .plot').data[0].y.every(name => name.startsWith('single.1 '))")
    click_cell(page, "#layer-map", 1, 2)  # below the modulation, whose activations have no bits
    says(page, "#cell-detail", "step 2")
    bits = page.evaluate("document.querySelector('#bits-curve .plot').data.map(trace => [trace.name, trace.x])")
    assert bits[0] == ["activations at step 2", [3, 4, 6, 8]]
    shoot(page, "2-sensitivity")


def test_the_table_does_what_the_map_does_and_needs_no_mouse(page):
    def cell(row, column):
        return page.locator("#cells table").first.locator("tbody tr").nth(row).locator("td").nth(column)

    def caption(row):
        return f"{cell(row, 1).inner_text().strip()}, step {cell(row, 0).inner_text().strip()}"

    cell(0, 1).click()
    says(page, "#cell-detail caption", caption(0))
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    says(page, "#cell-detail caption", caption(1))


def test_zoom_and_node_survive_an_update(page):
    page.evaluate("document.querySelector('#block-map .plot').marked = true")
    whole = layout_range(page, "#block-map")
    page.mouse.move(*cell_spot(page, "#block-map", 1, 0))
    page.mouse.down()
    page.mouse.move(*cell_spot(page, "#block-map", 6, 2), steps=8)
    page.mouse.up()
    page.wait_for_function("whole => document.querySelector('#block-map .plot')._fullLayout.xaxis.range[1] !== whole[1]", arg=whole)
    page.wait_for_timeout(500)  # sooner, the click would make the drag a double click, which resets the zoom
    zoomed = layout_range(page, "#block-map"), layout_range(page, "#block-map", "yaxis")
    click_cell(page, "#block-map", 5, 1)
    says(page, "#cell-detail", "single.3")
    page.wait_for_timeout(300)
    assert page.evaluate("document.querySelector('#block-map .plot').marked") is True
    assert (layout_range(page, "#block-map"), layout_range(page, "#block-map", "yaxis")) == zoomed
    assert zoomed[0] != whole


def test_what_changes_on_a_hidden_screen_is_drawn_when_it_is_shown(page):
    page.evaluate("""() => { document.querySelector('#block-map .plot').emit('plotly_click', {points: [{pointIndex: [0, 3]}]});
                             document.querySelectorAll('[role=tab]')[0].click(); }""")
    says(page, "#cell-detail", "step 3")
    tab(page, "Sensitivity")
    page.wait_for_function("document.querySelector('#layer-map .plot').data[0].y.every(name => name.startsWith('double.0 '))")


def test_search_draws_its_front_stops_and_goes_on(page, shoot):
    tab(page, "Search")
    page.get_by_text("Settings of the search").click()
    for name, value in (("beam", 4), ("configs", 4), ("samples", 2), ("finalists", 1)):  # long enough to be stopped on the way
        type_number(page, f"#form-SearchConfig-{name}", value)
    page.click("#search")
    page.wait_for_function("(document.querySelector('#pareto .plot').data || []).some(t => t.customdata?.[0]?.[0])", timeout=120_000)
    page.locator("#plan-table tbody tr").nth(0).click()  # what has been found can be chosen at once
    says(page, "#plan-numbers", "exact")
    page.click("#stop-search")
    says(page, "#notice-search", "stopped")
    assert page.evaluate("document.querySelector('#pareto .plot').data.length") > 0, "what was measured stays on the plot"
    assert page.inner_text("#search") == "Resume"
    page.click("#search")
    until_done(page, "search")
    page.wait_for_function("document.querySelector('#bit-map .plot').data.length === 2")
    numbers = page.inner_text("#plan-numbers")
    assert all(word in numbers for word in ("MB", "exact", "modelled", "measured", "MAC-weighted"))
    shoot(page, "3-search")


def test_a_slider_picks_another_plan_without_a_search(page):
    before = page.inner_text("#plan-numbers caption")
    ended = status(page)
    type_number(page, "#budget-bits", 16)
    type_number(page, "#budget-mb", page.get_attribute("#budget-mb input[type=range]", "max"))
    changes(page, "#plan-numbers caption", before)
    assert status(page) == ended
    line = page.evaluate("""document.querySelector('#pareto .plot').layout.shapes.filter(shape => shape.name === 'limit')
                            .map(shape => shape.x0)""")
    assert 16 in line


def test_a_budget_that_nothing_fits_says_what_would(page):
    type_number(page, "#budget-mb", page.get_attribute("#budget-mb input[type=range]", "min"))
    page.wait_for_selector("#notice-search .error")
    assert re.search(r"smallest takes [\d.]+ MB", page.inner_text("#notice-search"))
    type_number(page, "#budget-mb", page.get_attribute("#budget-mb input[type=range]", "max"))
    page.wait_for_selector("#notice-search .error", state="detached")


def test_a_point_on_the_front_is_a_plan(page):
    chosen = page.inner_text("#plan-numbers caption")
    page.locator("#pareto").scroll_into_view_if_needed()
    spot = page.evaluate("""() => {
        const node = document.querySelector('#pareto .plot'), full = node._fullLayout, box = node.getBoundingClientRect();
        const x = [], y = [];
        for (const t of node.data.filter(t => t.customdata?.[0]?.[0] && t.xaxis === 'x')) x.push(...t.x), y.push(...t.y);
        const i = y.indexOf(Math.max(...y));
        return [box.x + full.xaxis._offset + full.xaxis.l2p(x[i]), box.y + full.yaxis._offset + full.yaxis.l2p(Math.log10(y[i]))];
    }""")
    page.mouse.click(*spot)
    changes(page, "#plan-numbers caption", chosen)


def pixels(page, address):
    """The image at an address, as it arrived."""
    body = page.request.get(urljoin(page.url, address)).body()
    image = Image.open(io.BytesIO(body))
    assert image.format == "PNG"
    return np.asarray(image.convert("RGB")).astype(int)


def test_compare_is_lossless(page, shoot):
    tab(page, "Compare")
    page.fill("#compare-prompts textarea", PROMPTS)
    type_number(page, "#compare-steps", STEPS)
    page.click("#compare")
    until_done(page, "compare")
    page.wait_for_function("document.querySelector('#viewer .viewer').dataset.shown")
    left, right = (pixels(page, address) for address in page.get_attribute("#viewer .viewer", "data-shown").split(" "))
    assert left.shape == right.shape and not np.array_equal(left, right)
    numbers = page.inner_text("#compare-numbers")
    assert "MB" in numbers and "n = 2" in numbers and ("kernel" in numbers or "emulated" in numbers)
    says(page, "#viewer .caption", "fluent pizza · seed 0")
    page.locator("#pair-grid").get_by_text("noto anchor").click()
    says(page, "#viewer .caption", "noto anchor · seed 1")
    page.locator("#viewer .scrub input").fill("1")
    says(page, "#viewer .caption", "step 1: latent NMSE after it")
    page.locator("#viewer .scrub input").fill(str(STEPS))
    says(page, "#viewer .caption", "PSNR")
    shoot(page, "4-compare")


def test_export_and_a_plan_that_comes_back(page, shoot, tmp_path):
    tab(page, "Export")
    page.click("#export")
    until_done(page, "export")
    assert ".safetensors" in page.inner_text("#export-files")
    page.wait_for_selector("a#plan-download")
    with page.expect_download() as download:
        page.click("#plan-download")
    plan = json.loads(download.value.path().read_text())
    assert len(plan["act_bits_TL"]) == STEPS
    shoot(page, "5-export")
    stranger = tmp_path / "stranger.json"
    stranger.write_text(json.dumps(plan | {"model_hash": "0123456789abcdef"}))
    page.set_input_files(PLAN_UPLOAD, stranger)
    page.wait_for_selector("#notice-export .error")
    assert "0123456789abcdef" in page.inner_text("#notice-export")
    own = tmp_path / "own.json"
    own.write_text(json.dumps(plan))
    page.set_input_files(PLAN_UPLOAD, own)
    page.wait_for_selector("#notice-export .info")


def test_a_reload_loses_nothing(page):
    page.reload()
    says(page, "#status", "emoji-flux ready")
    assert page.input_value("#form-TraceConfig-steps input[type=number]") == str(STEPS)
    tab(page, "Search")
    says(page, "#plan-numbers", "exact")
    page.wait_for_function("document.querySelector('#pareto .plot').data?.some(t => t.customdata?.[0]?.[0])")
    tab(page, "Sensitivity")
    page.wait_for_function("document.querySelector('#block-map .plot').data?.[0]?.type === 'heatmap'")


def test_an_idle_page_asks_for_nothing(page):
    page.wait_for_timeout(1500)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.wait_for_timeout(1500)
    assert asked == []


def compare_methods(page, names, steps):
    for name in page.locator("#methods-chosen label").all():
        name.locator("input").set_checked(name.inner_text().strip() in names)
    type_number(page, "#methods-steps", steps)
    page.fill("#methods-prompts textarea", PROMPTS)
    page.click("#methods-run")


def test_methods_stand_side_by_side_and_their_table_can_be_taken_away(page, shoot):
    tab(page, "Methods")
    compare_methods(page, {"RTN", "SmoothQuant"}, 2)
    until_done(page, "contest")
    table = page.inner_text("#methods-table")
    assert "RTN" in table and "SmoothQuant" in table and "±" in table
    shown = page.evaluate("document.querySelector('#methods-plot .plot').data.map(t => t.name)")
    assert {"RTN", "SmoothQuant"} <= set(shown)
    page.wait_for_selector("#methods-grid img")
    with page.expect_download() as download:
        page.click("#methods-csv")
    text = Path(download.value.path()).read_text()
    assert text.splitlines()[0].startswith("method,") and len(text.splitlines()) == 3
    shoot(page, "6-methods")


def test_a_method_can_be_skipped_and_a_comparison_cancelled(page):
    compare_methods(page, {"GPTQ", "QuaRot"}, 8)
    page.wait_for_function("document.querySelector('#status').innerText.includes('(1 of 2)')")
    page.click("#methods-skip")
    page.wait_for_function("document.querySelector('#status').innerText.includes('(2 of 2)')")
    page.click("#methods-cancel")
    says(page, "#status", "contest: cancelled", 30)
    assert "SmoothQuant" in page.inner_text("#methods-table"), "the earlier table stays"


def test_a_phone_shows_every_screen_without_sideways_scrolling(page, shoot):
    page.set_viewport_size({"width": 390, "height": 844})
    for name in ("Model", "Sensitivity", "Search", "Compare", "Export", "Methods"):
        tab(page, name)
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), name
        shoot(page, f"phone-{name.lower()}")


def test_nothing_left_this_machine_and_the_console_is_clean(page):
    assert page.outside == []
    assert page.errors == []


def test_the_guided_visit_on_the_model_that_draws(chrome, app):
    """Four buttons, each pressed as soon as it offers itself, as a new visitor with a session of their own."""
    context = chrome.new_context(viewport={"width": 1440, "height": 900})
    opened = watched(context.new_page())
    opened.set_default_timeout(150_000)
    opened.goto(app.url)
    says(opened, "#status", "emoji-flux ready")
    for stop, kind in enumerate(("profile", "search", "compare", "export")):
        opened.locator(".tour li.next").nth(0).get_by_role("button").click()
        until_done(opened, kind)
        opened.wait_for_selector(f".tour li.done >> nth={stop}")
    assert opened.locator(".tour li.done").count() == 4 and opened.locator(".tour [role=alert]").count() == 0
    assert (opened.errors, opened.outside) == ([], [])
    context.close()
