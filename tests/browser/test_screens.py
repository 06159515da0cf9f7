"""The five screens in a real browser on made-up numbers: the guided visit, what is linked, what is exact, and who stays apart."""

import io
import json
import re
import zipfile
from pathlib import Path
from urllib.parse import urljoin

import numpy as np
import pytest
from PIL import Image

from tests.ui.fakes import FakePipeline, make_layers
from workbench.ui import limits
from workbench.ui.tour import TOUR_STEPS

pytestmark = pytest.mark.browser
STOPS = ("profile", "search", "compare", "export")


def go(page, stop):
    """Press one button of the guided visit."""
    page.locator(".tour li").nth(stop).get_by_role("button").click()


def until_done(page, kind):
    page.wait_for_function("kind => document.querySelector('#status').innerText.includes(kind + ': done')", arg=kind, timeout=60_000)


def tour(page, stops=4):
    for stop, kind in enumerate(STOPS[:stops]):
        go(page, stop)
        until_done(page, kind)


def tab(page, name):
    page.get_by_role("tab", name=name, exact=True).click()


def says(page, selector, text):
    from playwright.sync_api import expect

    expect(page.locator(selector)).to_contain_text(text)


def spot(page, plot, row, column):
    """Where the middle of a heatmap's cell is on the page."""
    page.locator(plot).scroll_into_view_if_needed()
    return page.evaluate("""([plot, row, column]) => {
        const node = document.querySelector(plot + ' .plot'), full = node._fullLayout, box = node.getBoundingClientRect();
        const y = full.yaxis.d2p(full.yaxis._categories[row]);
        return [box.x + full.xaxis._offset + full.xaxis.d2p(column), box.y + full.yaxis._offset + y];
    }""", [plot, row, column])


def fetched(page, address):
    """The pixels behind an address, as they arrived."""
    body = page.request.get(urljoin(page.url, address)).body()
    image = Image.open(io.BytesIO(body))
    assert image.format == "PNG"
    return np.asarray(image.convert("RGB"))


def produced(index=0, count=4):
    """(float, quantized) images of the fake pipeline, made here again."""
    from types import SimpleNamespace

    from tests.ui.fakes import FakeBundle

    made = FakePipeline().compare(FakeBundle(), SimpleNamespace(plan=None, weight_bytes=1), [str(i) for i in range(count)], 0, TOUR_STEPS)
    return made.pairs[index].image_float, made.pairs[index].image_quantized


def shown(page):
    """Addresses of the two images on the comparing canvas."""
    return page.get_attribute("#viewer .viewer", "data-shown").split(" ")


def wait_shown(page, not_this=""):
    page.wait_for_function("""before => { const now = document.querySelector('#viewer .viewer').dataset.shown;
                                           return now && now !== before; }""", arg=not_this)


def test_the_guided_visit_from_first_paint_to_download(visit, tmp_path, shoot):
    page = visit()
    assert "next" in page.locator(".tour li").first.get_attribute("class")
    tour(page)
    assert page.locator(".tour li.done").count() == 4
    assert page.locator("#export-files").inner_text().count("safetensors")
    for name, ending in (("checkpoint", ".zip"), ("plan", ".json"), ("report", ".html"), ("images", ".zip"), ("tables", ".zip")):
        page.wait_for_selector(f"a#{name}-download")
        with page.expect_download() as download:
            page.click(f"#{name}-download")
        assert download.value.suggested_filename.endswith(ending)
        download.value.save_as(tmp_path / f"{name}{ending}")
    assert len(json.loads((tmp_path / "plan.json").read_text())["act_bits_TL"]) == TOUR_STEPS
    with zipfile.ZipFile(tmp_path / "images.zip") as images:
        first = np.asarray(Image.open(io.BytesIO(images.read("001-quantized.png"))))
        assert np.array_equal(first, produced()[1]) and len(images.namelist()) == 2 * 4 + 1
    shoot(page, "fake-5-export")


def test_the_report_opens_offline(visit, tmp_path):
    page = visit()
    tour(page)
    page.wait_for_selector("a#report-download")
    with page.expect_download() as download:
        page.click("#report-download")
    path = tmp_path / "report.html"
    download.value.save_as(path)
    asked = []
    page.on("request", lambda request: asked.append(request.url) if not request.url.startswith("data:") else None)
    page.context.set_offline(True)
    page.goto(path.as_uri())
    assert page.locator("svg").count() >= 4 and page.locator(".pair img").count() == 8
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth === 128)")
    assert "●measured" in page.inner_text("body") and asked == [path.as_uri()]


def test_a_click_reaches_its_layer_and_step_on_every_screen(visit):
    page = visit()
    tour(page, 3)
    tab(page, "Sensitivity")
    page.mouse.click(*spot(page, "#block-map", 3, 5))
    says(page, "#cell-detail caption", "step 5")
    page.wait_for_function("document.querySelector('#layer-map .plot').data?.[0]?.y?.length === 6")
    page.mouse.click(*spot(page, "#layer-map", 1, 6))
    says(page, "#cell-detail caption", "blocks.3 k, step 6")
    page.wait_for_function("document.querySelector('#channels .plot').data.length === 2")
    layer = next(i for i, each in enumerate(make_layers()) if each.name == "blocks.3.k")
    tab(page, "Search")
    page.wait_for_function("""layer => document.querySelector('#bit-map .plot').layout.shapes.some(
                              s => s.y0 === layer - 0.5 && s.x0 === 5.5)""", arg=layer)
    page.mouse.click(*spot(page, "#bit-map", 2, 4))
    tab(page, "Compare")
    page.wait_for_function("document.querySelector('#latent-curve .plot').layout.shapes.some(s => s.x0 === 4)")
    tab(page, "Sensitivity")
    says(page, "#cell-detail caption", "blocks.0 v, step 4")


def test_zoom_and_node_survive_what_changes(visit):
    page = visit()
    tour(page, 1)
    page.wait_for_function("document.querySelector('#block-map .plot').data?.[0]?.type === 'heatmap'")
    page.evaluate("document.querySelector('#block-map .plot').marked = true")
    page.mouse.move(*spot(page, "#block-map", 1, 1))
    page.mouse.down()
    page.mouse.move(*spot(page, "#block-map", 3, 5), steps=6)
    page.mouse.up()
    page.wait_for_timeout(500)  # sooner, the next click would make it a double click, which resets the zoom
    zoomed = page.evaluate("document.querySelector('#block-map .plot')._fullLayout.xaxis.range")
    assert zoomed[1] < TOUR_STEPS - 0.5
    page.locator("#cells tbody tr").nth(4).click()
    page.locator("#quantity input").click()
    page.get_by_role("option", name="error at b bits").click()
    page.wait_for_function("document.querySelector('#block-map .plot').data[0].colorbar.title.text.startsWith('predicted error at 4')")
    assert page.evaluate("document.querySelector('#block-map .plot')._fullLayout.xaxis.range") == zoomed
    assert page.evaluate("document.querySelector('#block-map .plot').marked") is True


def test_compared_images_are_the_pipeline_s_bit_for_bit_and_never_shifted(visit):
    page = visit()
    tour(page, 3)
    wait_shown(page)
    left, right = (fetched(page, address) for address in shown(page))
    expected = produced(0)
    assert np.array_equal(left, expected[0]) and np.array_equal(right, expected[1])
    before = " ".join(shown(page))
    page.locator("#pair-grid .thumb").nth(2).click()
    wait_shown(page, before)
    assert all(np.array_equal(fetched(page, address), image) for address, image in zip(shown(page), produced(2)))

    page.get_by_role("button", name="Difference").click()
    gain = float(page.locator("#viewer .gain input").input_value())
    page.wait_for_function("document.querySelector('#viewer .viewer').adatsq.gap")
    gap = np.array(page.evaluate("""() => { const gap = document.querySelector('#viewer .viewer').adatsq.gap;
        return [...gap.getContext('2d').getImageData(0, 0, gap.width, gap.height).data]; }""")).reshape(128, 128, 4)
    a, b = (image.astype(int) for image in produced(2))
    assert np.array_equal(gap[..., :3], np.clip(np.abs(a - b) * gain, 0, 255))

    page.get_by_role("button", name="Flip").click()
    canvas = page.locator("#viewer canvas")
    canvas.focus()
    for pressed, image in ((False, produced(2)[0]), (True, produced(2)[1])):
        page.keyboard.down(" ") if pressed else page.keyboard.up(" ")
        drawn = page.evaluate("""() => { const node = document.querySelector('#viewer canvas'), size = 128 * 3;
            const x = Math.round(node.width / 2 - size / 2), y = Math.round(node.height / 2 - size / 2);
            return [...node.getContext('2d').getImageData(x, y, size, size).data]; }""")
        pixels = np.array(drawn).reshape(384, 384, 4)[1::3, 1::3, :3]
        inside = np.s_[16:, :]  # the label covers the top
        assert np.array_equal(pixels[inside], image[inside]), "the same place, whichever is shown"
    page.keyboard.up(" ")


def test_the_scrubber_shows_both_models_at_the_same_step(visit):
    page = visit()
    tour(page, 3)
    wait_shown(page)
    before = " ".join(shown(page))
    page.locator("#viewer .scrub input").fill("2")
    says(page, "#viewer .caption", "step 2: latent NMSE after it")
    wait_shown(page, before)
    share = 3 / TOUR_STEPS
    for address, image in zip(shown(page), produced(0)):
        assert np.array_equal(fetched(page, address), (image * share).astype(np.uint8))
    page.evaluate("""() => { const viewer = document.querySelector('#viewer .viewer'); window.seen = [];
        new MutationObserver(() => window.seen.push(viewer.dataset.shown)).observe(viewer, {attributeFilter: ['data-shown']}); }""")
    for step in (3, 2):
        page.locator("#viewer .scrub input").fill(str(step))
        says(page, "#viewer .caption", f"step {step}: latent NMSE after it")
    assert len(set(page.evaluate("window.seen"))) == 2 and before not in page.evaluate("window.seen"), "nothing flashes between two steps"
    tab(page, "Sensitivity")
    page.wait_for_function("document.querySelector('#time-strip .plot') !== null")
    tab(page, "Compare")
    page.locator("#viewer .scrub input").fill(str(TOUR_STEPS))
    says(page, "#viewer .caption", "PSNR")
    assert " ".join(shown(page)) == before


def test_a_blind_answer_is_counted_and_gives_nothing_away(visit):
    page = visit()
    tour(page, 3)
    wait_shown(page)
    page.get_by_role("button", name="Blind test").click()
    says(page, "#viewer .tally", "No answer yet")
    says(page, "#pair-grid", "hidden")
    floats = {produced(i)[0].tobytes() for i in range(4)}
    for answer in range(1, 4):
        before = " ".join(shown(page))
        a_is_float = fetched(page, shown(page)[0]).tobytes() in floats
        page.get_by_role("button", name="A looks better" if a_is_float else "B looks better").click()
        says(page, "#viewer .tally", f"float preferred {answer}")
        wait_shown(page, before)


def test_painting_changes_plan_and_cost_at_once_and_can_be_undone(visit):
    page = visit()
    tour(page, 2)
    caption = page.inner_text("#plan-numbers caption")
    page.get_by_label("paint 16").check()
    page.wait_for_function("document.querySelector('#bit-map .plot').layout.meta.brush === 16")
    page.mouse.move(*spot(page, "#bit-map", 2, 1))
    page.mouse.down()
    page.mouse.move(*spot(page, "#bit-map", 4, 3), steps=5)
    page.mouse.up()
    says(page, "#plan-numbers caption", "painted by hand")
    bits = page.evaluate("document.querySelector('#bit-map .plot').data[1].customdata")
    assert all(bits[layer][step] == 16 for layer in (2, 3, 4) for step in (1, 2, 3)) and sum(row.count(16) for row in bits) == 9
    mean = float(re.search(r"mean activation bits, plain\s+([\d.]+)", page.inner_text("#plan-numbers"))[1])
    assert mean == pytest.approx(np.mean(bits), abs=5e-4)
    assert "measured" not in page.inner_text("#plan-numbers")
    page.click("#undo")
    says(page, "#plan-numbers caption", caption)


@pytest.mark.parametrize(("width", "dark"), [(1440, False), (1440, True), (390, False), (390, True)])
def test_a_painted_plan_is_measured_on_request_and_says_both_errors(visit, shoot, width, dark):
    page = visit(width=width, height=900, dark=dark)
    tour(page, 2)
    page.get_by_label("paint 16").check()
    page.wait_for_function("document.querySelector('#bit-map .plot').layout.meta.brush === 16")
    page.mouse.click(*spot(page, "#bit-map", 2, 1))
    says(page, "#plan-numbers caption", "painted by hand")
    says(page, "#plan-numbers", "predicted error (NMSE of the final latent)")
    says(page, "#plan-measure", "not measured")
    name = f"measure-{width}-{'dark' if dark else 'light'}"
    page.locator("#plan-measure").scroll_into_view_if_needed()
    shoot(page, f"{name}-before")
    page.get_by_role("button", name="Measure its error").click()
    says(page, "#plan-measure", "Being measured")
    page.get_by_role("button", name="Stop measuring").click()
    page.wait_for_function("document.querySelector('#status').innerText.includes('measurement: cancelled')")
    says(page, "#notice-plan", "measurement was stopped")
    page.get_by_role("button", name="Measure its error").click()
    until_done(page, "measurement")
    says(page, "#plan-numbers", "measured, mean and 95 % interval over 16 held-out prompts")
    says(page, "#plan-numbers", "predicted error (NMSE of the final latent)")
    assert page.inner_text("#plan-measure").strip() == ""
    names = page.evaluate("document.querySelector('#pareto .plot').data.map(trace => trace.name)")
    assert "chosen, measured on held-out prompts" in names and "painted, error modelled" not in names
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("(b => b.scrollWidth - b.clientWidth)(document.querySelector('#plan-numbers .scroll'))") == 0
    page.locator("#plan-numbers").scroll_into_view_if_needed()
    shoot(page, f"{name}-after")


def test_the_cells_of_a_map_are_reached_and_painted_with_the_keyboard(visit):
    page = visit()
    tour(page, 2)
    tab(page, "Sensitivity")
    page.mouse.click(*spot(page, "#block-map", 3, 5))
    says(page, "#cell-detail caption", "step 5")
    page.locator("#block-map .plot").focus()
    for key in ("ArrowLeft", "ArrowLeft", "ArrowUp"):
        page.keyboard.press(key)
    says(page, "#cell-detail caption", "step 3")
    says(page, "#cell-detail caption", "blocks.2")
    tab(page, "Search")
    page.get_by_label("paint 16").check()
    page.wait_for_function("document.querySelector('#bit-map .plot').layout.meta.brush === 16")
    at = page.evaluate("(() => { const s = document.querySelector('#bit-map .plot').layout.shapes[0]; return [s.y0 + .5, s.x0 + .5]; })()")
    page.locator("#bit-map .plot").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    says(page, "#plan-numbers caption", "painted by hand")
    page.wait_for_function("([row, column]) => document.querySelector('#bit-map .plot').data[1].customdata[row][column] === 16",
                           arg=[int(at[0]), int(at[1]) + 1])
    says(page, "#plan-numbers", "times its predicted error")


def test_the_status_stays_in_view(visit):
    page = visit()
    tour(page, 2)
    page.mouse.wheel(0, 1500)
    page.wait_for_function("window.scrollY > 900")
    assert page.evaluate("document.querySelector('#status').getBoundingClientRect().top") >= 0
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]


def test_a_point_and_a_row_choose_the_same_plan(visit):
    page = visit()
    tour(page, 2)
    caption = "#plan-numbers caption"

    def choose_row(row):
        """A row is marked at once; the server's answer is the plan's name."""
        before = page.inner_text(caption)
        page.locator("#plan-table tbody tr").nth(row).click()
        page.wait_for_selector(f"#plan-table tbody tr:nth-child({row + 1})[aria-pressed=true]")
        page.wait_for_function("([where, before]) => document.querySelector(where).innerText !== before", arg=[caption, before])
        return page.inner_text(caption)

    by_row = choose_row(1)
    choose_row(0)
    page.locator("#pareto").scroll_into_view_if_needed()
    place = page.evaluate("""() => {
        const plan = JSON.parse(document.querySelector('#plan-table tbody tr:nth-child(2)').dataset.pick).plan;
        const node = document.querySelector('#pareto .plot'), full = node._fullLayout, box = node.getBoundingClientRect();
        const of_plan = t => (t.customdata || []).findIndex(custom => custom[0] === plan);
        const trace = node.data.find(t => t.xaxis === 'x' && of_plan(t) >= 0), i = of_plan(trace);
        return [box.x + full.xaxis._offset + full.xaxis.l2p(trace.x[i]),
                box.y + full.yaxis._offset + full.yaxis.l2p(Math.log10(trace.y[i]))];
    }""")
    page.mouse.click(*place)
    says(page, caption, by_row)


def test_knee_floor_and_recipe_diff(visit):
    page = visit()
    tour(page, 2)
    page.click("#pin")
    says(page, "#plan-difference", "choose another")
    page.click("#knee")
    page.locator("#floor-db input").fill("25")
    page.click("#floor")
    page.wait_for_function("document.querySelector('#pareto .plot').layout.shapes.some(s => s.name === 'floor')")
    page.locator("#plan-table tbody tr[aria-pressed=false]").first.click()
    says(page, "#plan-difference", "A, plan")
    page.locator("#floor-db input").fill("90")
    page.click("#floor")
    says(page, "#notice-search", "no plan of the front reaches 90 dB")


def test_a_link_restores_prompts_and_plan_for_somebody_else(visit):
    page = visit()
    tour(page, 2)
    tab(page, "Export")
    caption = page.inner_text("#export-files caption")
    link = page.get_attribute("#link a", "href")
    other = visit(query=link)
    says(other, "#notice-model", "the link's plan")
    tab(other, "Export")
    says(other, "#export-files", caption.split(":")[0])
    broken = visit(query="?plan=" + "x" * 50)
    says(broken, "#notice-model", "cannot be read")


def test_two_visitors_stay_apart_and_wait_in_line(visit):
    first, second = visit(), visit()
    go(first, 0)
    go(second, 0)
    until_done(first, "profile")
    until_done(second, "profile")
    go(first, 1)
    until_done(first, "search")
    tab(second, "Search")
    assert "No plan is chosen" in second.inner_text("#plan-numbers")
    assert second.locator(".tour li.done").count() == 1 and first.locator(".tour li.done").count() == 2


def test_a_visit_without_a_mouse(visit):
    page = visit()

    def focus_and_press(locator, key="Enter"):
        locator.focus()
        page.keyboard.press(key)

    for stop, kind in enumerate(STOPS[:2]):
        focus_and_press(page.locator(".tour li").nth(stop).get_by_role("button"))
        until_done(page, kind)
    focus_and_press(page.get_by_role("tab", name="Sensitivity", exact=True))
    page.locator("#cells tbody tr").first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    chosen = page.evaluate("JSON.parse(document.activeElement.dataset.pick)")
    page.keyboard.press("Enter")
    says(page, "#cell-detail caption", f"step {chosen['step']}")
    page.wait_for_function("""chosen => { const held = JSON.parse(document.activeElement?.dataset?.pick ?? '{}');
                                         return held.layer === chosen.layer && held.step === chosen.step; }""", arg=chosen)
    focus_and_press(page.get_by_role("tab", name="Search", exact=True))
    before = page.inner_text("#plan-numbers caption")
    page.locator("#plan-table tbody tr").last.focus()
    page.keyboard.press("Enter")
    page.wait_for_function("before => document.querySelector('#plan-numbers caption').innerText !== before", arg=before)
    focus_and_press(page.locator(".tour li").nth(2).get_by_role("button"))
    until_done(page, "compare")
    focus_and_press(page.locator("#viewer canvas"), "3")
    page.wait_for_selector("#viewer .modes button[data-mode=beside][aria-pressed=true]")


@pytest.mark.parametrize(("width", "dark"), [(390, True), (1440, True), (390, False)])
def test_every_screen_in_every_state_fits(visit, shoot, width, dark):
    page = visit(width=width, height=844, dark=dark)
    name = f"{width}-{'dark' if dark else 'light'}"
    for state in ("empty", "done"):
        if state == "done":
            tour(page)
            tab(page, "Sensitivity")
            page.locator("#cells tbody tr").first.click()
        for screen in ("Model", "Sensitivity", "Search", "Compare", "Export"):
            tab(page, screen)
            page.wait_for_timeout(250)
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), (screen, state)
            shoot(page, f"fake-{screen.lower()}-{state}-{name}")


def test_a_press_before_the_scripts_have_come_is_not_lost(chrome, fake_app):
    context, held = chrome.new_context(), []
    page = context.new_page()
    page.route("**/picker.js*", lambda route: held.append(route))
    page.goto(fake_app.url)
    says(page, "#status", "ready")
    go(page, 0)
    assert held and "profile" not in page.inner_text("#status")
    for route in held:
        route.continue_()
    until_done(page, "profile")
    context.close()


def test_flip_is_held_right_after_its_button_was_pressed(visit):
    page = visit()
    tour(page, stops=3)
    tab(page, "Compare")
    page.locator("#viewer .modes button[data-mode=flip]").click()
    flipped = "document.querySelector('#viewer .viewer').adatsq.flipped"
    page.keyboard.down(" ")
    assert page.evaluate(flipped) is True
    page.keyboard.up(" ")
    assert page.evaluate(flipped) is False
    page.keyboard.press("3")
    for _ in range(30):  # however far one pushes, the images stay in sight
        page.keyboard.press("ArrowRight")
    assert page.evaluate("document.querySelector('#viewer .viewer').adatsq.x") == 0.5


def test_a_budget_that_is_typed_is_answered_in_its_line_and_nowhere_else(visit):
    page = visit()
    tour(page, stops=2)
    tab(page, "Search")
    page.locator("#budget-mb input[type=number]").fill("0.1")
    says(page, "#notice-search", "no plan of the front")
    page.locator("#replay input[type=number]").fill("99")
    page.wait_for_timeout(800)
    assert page.locator(".toast-wrap [role=alert], .toast-body").count() == 0


def test_a_phone_stacks_the_panels_of_the_front(visit):
    page = visit(width=390, height=844)
    tour(page, stops=2)
    tab(page, "Search")
    page.wait_for_selector("#pareto .scatterlayer path")
    places = page.evaluate("""() => { const full = document.querySelector('#pareto .plot')._fullLayout;
        return ['', '2'].map(n => [full['xaxis' + n]._offset, full['xaxis' + n]._length, full['yaxis' + n]._offset]); }""")
    assert places[0][:2] == places[1][:2] and places[0][2] + 150 < places[1][2]
    page.set_viewport_size({"width": 1440, "height": 900})
    page.wait_for_function("""() => { const full = document.querySelector('#pareto .plot')._fullLayout;
        return full.xaxis._offset + full.xaxis._length < full.xaxis2._offset && full.yaxis._offset === full.yaxis2._offset; }""")


def test_screenshots_are_kept_out_of_the_repository(root):
    assert "/tests/browser/screenshots/" in Path(root, ".gitignore").read_text()


@pytest.mark.parametrize(("screen", "button"), [("Model", "Upload prompts: .txt, .csv or .json"), ("Export", "Import a plan (JSON)")])
def test_a_file_above_the_limit_is_refused_in_the_screens_line(visit, tmp_path, screen, button):
    page, large = visit(), tmp_path / "large.json"
    with large.open("wb") as file:
        file.truncate((limits.here().upload_mb * 1024 + 1) * 1024)
    tab(page, screen)
    refused = page.locator(".notice.error", has_text="large.json has 10.5 MB; a file may have at most 10 MB here")
    for _ in range(2):  # the same file again is refused again
        page.set_input_files(f"input[data-testid='{button}-upload-button']", large)
        refused.wait_for()
        assert refused.count() == 1 and page.locator(".toast-wrap [role=alert], .toast-body").count() == 0
        page.locator("#status").click()  # whatever one does next, the line has been read
        refused.wait_for(state="detached")
