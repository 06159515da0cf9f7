"""Screen 4: the same seed through float and quantized, side by side and lossless."""

from __future__ import annotations

import gradio as gr

from workbench.options import TraceConfig
from workbench.ui import actions, forms, tables, views
from workbench.ui.live import Page
from workbench.ui.tabs import notice_line
from workbench.ui.widget import plot


def build(page: Page) -> None:
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            prompts = gr.Textbox(label=f"prompts, one per line, at most {actions.PROMPTS_COMPARED}", lines=4, elem_id="compare-prompts",
                                 interactive=True)
            with gr.Row():
                seed = forms.component(TraceConfig, "seed", elem_id="compare-seed")
                steps = forms.component(TraceConfig, "steps", elem_id="compare-steps")
            with gr.Row():
                start = gr.Button("Generate", variant="primary", elem_id="compare", min_width=120, interactive=False)
                cancel = gr.Button("Cancel", elem_id="cancel-compare", min_width=120, interactive=False)
            notice_line(page, "compare")
            badge, numbers = gr.HTML(elem_id="badge"), gr.HTML(elem_id="compare-numbers")
        with gr.Column(scale=3, min_width=340):
            shown = gr.Radio([], label="shown prompt", elem_id="pair", visible=False)
            slider = gr.ImageSlider(format="png", label="float | quantized", elem_id="slider", elem_classes=["pixels"], interactive=False,
                                    height=420, max_height=420)
            line = gr.HTML(elem_id="pair-line")
            with gr.Row():
                images = [gr.Image(format="png", label=label, interactive=False, height=230, min_width=140, elem_id=f"image-{name}",
                                   elem_classes=["pixels"], buttons=["download", "fullscreen"])
                          for name, label in (("float", "float"), ("quantized", "quantized"), ("difference", "|difference| × gain"))]
            gain = gr.Slider(1, 64, value=8, step=1, label="gain of the difference", elem_id="gain")
            curve = plot(elem_id="latent-curve", height=260, label="Latent error after each step")
    page.show(prompts, ["bundle"], lambda s: "\n".join(s.bundle.prompts("showcase")[:4]) if s.bundle else gr.skip())
    page.show(start, ["busy", "chosen", "profile"], lambda s: gr.Button(interactive=bool(s.chosen and s.profile) and not s.busy))
    page.show(cancel, ["busy"], lambda s: gr.Button(interactive=s.busy and s.job.kind == "compare"))
    _show_pair(page, shown, slider, line, images, curve)
    page.show(badge, ["comparison"], lambda s: views.compute_badge(s.comparison.compute, s.comparison.reason) if s.comparison else "")
    page.show(numbers, ["comparison"], lambda s: views.comparison_numbers(s.comparison) if s.comparison else "")
    page.on(start.click, actions.compare, [prompts, seed, steps], tab="compare")
    page.on(cancel.click, actions.stop, tab="compare")
    page.on(shown.input, actions.show_pair, [shown], tab="compare")
    page.on(gain.input, actions.set_gain, [gain], tab="compare", trigger_mode="always_last")


def _show_pair(page: Page, shown, slider, line, images, curve) -> None:
    def pair(session):
        return session.comparison.pairs[session.pair] if session.comparison else None

    def choices(session):
        pairs = session.comparison.pairs if session.comparison else ()
        return gr.Radio(choices=[(p.prompt, i) for i, p in enumerate(pairs)], value=session.pair if pairs else None, visible=len(pairs) > 1)

    def changed(session):
        p = pair(session)
        return views.difference(p.image_float, p.image_quantized, session.gain) if p else None

    now = ["comparison", "pair"]
    page.show(shown, now, choices)
    page.show(slider, now, lambda s: (pair(s).image_float, pair(s).image_quantized) if s.comparison else None)
    page.show(line, now, lambda s: tables.notice(views.pair_line(pair(s)), "plain") if s.comparison else "")
    page.show(images[0], now, lambda s: pair(s).image_float if s.comparison else None)
    page.show(images[1], now, lambda s: pair(s).image_quantized if s.comparison else None)
    page.show(images[2], [*now, "gain"], changed)
    page.show(curve, now, lambda s: views.error_over_steps(s.comparison, s.pair))
