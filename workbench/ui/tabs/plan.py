"""The lower half of screen 3: the chosen plan's bits, which can be painted, its costs, its images, and what differs from plan A."""

from __future__ import annotations

import gradio as gr

from workbench.ui import tables, widget
from workbench.ui.actions import compare as compare_actions
from workbench.ui.actions import measure as measuring
from workbench.ui.actions import search as actions
from workbench.ui.bindings import Page
from workbench.ui.tabs import notice_line
from workbench.ui.views import plans
from workbench.ui.views import search as views

BRUSHES = [("select", "off"), *((f"paint {bits}", bits) for bits in (3, 4, 6, 8, 16))]


def build(page: Page) -> None:
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=340):
            _bits(page)
            _pin(page)
            _two_plans(page)
        with gr.Column(scale=2, min_width=320):
            _facts(page)


def _bits(page: Page) -> None:
    with gr.Row(equal_height=True, elem_classes=["tools"]):
        label = "brush: drag over cells, or over the column W for stored weights"
        brush = gr.Radio(BRUSHES, value="off", label=label, elem_id="brush", scale=3, min_width=300)
        undo = gr.Button("Undo", elem_id="undo", min_width=80, scale=0, interactive=False)
    notice_line(page, "plan")  # here, since the top of the screen is out of sight
    label = "Bits of the chosen plan, layer by step"
    bits = widget.plot(elem_id="bit-map", height=420, label=label, paintable=True, described_by="plan-numbers")
    page.show(bits, ["chosen", "cell", "brush"], lambda s: plans.bit_map(
        s.chosen and s.chosen.plan, s.bundle and s.bundle.layers, actions.cell_of_plan(s), s.brush))
    page.show(undo, ["edits"], lambda s: gr.Button(interactive=bool(s.edits)))
    page.show(brush, ["brush"], lambda s: s.brush or "off")
    page.on(brush.input, actions.set_brush, [brush], tab="plan")
    page.on(undo.click, actions.undo, tab="plan")
    page.on(bits.cell_click, actions.click_bits, tab="plan", with_payload=True)
    page.on(bits.paint, actions.paint, tab="plan", with_payload=True)


def _facts(page: Page) -> None:
    numbers = gr.HTML(elem_id="plan-numbers")
    measure = widget.picker("plan-measure")
    images, table = widget.picker("plan-images"), widget.picker("plan-table")
    page.show(numbers, ["chosen", "edits"], _numbers)
    page.show(measure, ["chosen", "busy", "profile", "example", "measuring"], lambda s: plans.measuring(
        s.chosen, measuring.running(s) and s.measuring == s.chosen.plan.plan_id, measuring.missing(s)))
    page.show(images, ["comparison", "pair", "chosen", "mode", "busy", "profile", "drafts"], _images)
    page.show(table, ["so_far", "result", "chosen"], _tables)
    page.on(table.pick, actions.click_point, tab="plan", with_payload=True)
    page.on(measure.pick, measuring.pick, tab="plan", with_payload=True)
    page.on(images.pick, compare_actions.pick_or_draw, tab="plan", with_payload=True)


def _numbers(session) -> str:
    if session.chosen is None or session.bundle is None:
        return tables.empty("No plan is chosen", "A search chooses one; a click on the front, a link or a file chooses another.")
    facts = plans.plan_numbers(session.chosen, session.bundle, session.profile and session.profile.costs, session.edits)
    return facts + plans.bits_table(session.chosen.plan, session.bundle.layers)


def _pin(page: Page) -> None:
    """Below the map: the chosen plan becomes A, and whatever is chosen next is compared with it, right below."""
    with gr.Row(elem_classes=["tools"]):
        pin = gr.Button("Pin the chosen plan as A", elem_id="pin", min_width=190, scale=0, interactive=False)
        swap = gr.Button("Swap A and B", elem_id="swap", min_width=120, scale=0, interactive=False)
    page.show(pin, ["chosen"], lambda s: gr.Button(interactive=s.chosen is not None))
    page.show(swap, ["chosen", "pinned"], lambda s: gr.Button(interactive=s.chosen is not None and s.pinned is not None))
    page.on(pin.click, actions.pin, tab="plan")
    page.on(swap.click, actions.swap, tab="plan")


def _two_plans(page: Page) -> None:
    differ = gr.HTML(elem_id="plan-difference")
    with gr.Column(visible=False) as both:
        change = widget.plot(elem_id="change-map", height=420, label="Recipe diff: bits of the chosen plan (B) less those of plan A")
    page.show(both, ["chosen", "pinned"], lambda s: gr.Column(visible=_differ(s)))
    page.show(differ, ["chosen", "pinned"], _difference)
    page.show(change, ["chosen", "pinned"], lambda s: plans.difference_map(
        s.pinned and s.pinned.plan, s.chosen and s.chosen.plan, s.bundle and s.bundle.layers))


def _images(session) -> str:
    if session.chosen is None:
        return ""
    if session.comparison is None and not compare_actions.drawing(session):
        missing = compare_actions.missing(session)
        button = f'<button type="button" {tables.pick({"draw": True}, tag="button")}{" disabled" * bool(missing)}>Draw its images</button>'
        return tables.empty("No images of this plan yet",
                            missing or "The prompts of the Compare screen, through float and through this plan.", button)
    return compare_actions.cards(session)


def _tables(session) -> str:
    found, result = session.found, session.result
    if found is None or not found.front:
        return ""
    plan_table = views.plan_table(views.points(found), session.chosen and session.chosen.plan.plan_id, found.front[0].samples)
    return plan_table + (views.parts_table(result) + views.ranking_table(result) if result is not None else "")


def _differ(session) -> bool:
    return session.pinned is not None and session.chosen is not None and session.pinned.plan.plan_id != session.chosen.plan.plan_id


def _difference(session) -> str:
    if session.pinned is None or session.chosen is None:
        return ""
    line = tables.notice(plans.difference_line(session.pinned.plan, session.chosen.plan), "info")
    costs = session.profile and session.profile.costs
    return line + (plans.two_plans(session.pinned, session.chosen, session.bundle, costs) if _differ(session) else "")
