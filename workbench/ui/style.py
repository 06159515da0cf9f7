"""Theme and style sheet: system fonts only, so that no page asks for a file from elsewhere."""

from __future__ import annotations

import gradio as gr

from workbench.ui.widget import STATIC

SANS = ["system-ui", "-apple-system", "Segoe UI", "Liberation Sans", "DejaVu Sans", "sans-serif"]
MONO = ["ui-monospace", "Cascadia Mono", "Liberation Mono", "DejaVu Sans Mono", "monospace"]


def theme() -> gr.themes.Base:
    return gr.themes.Base(primary_hue="blue", neutral_hue="slate", font=SANS, font_mono=MONO, radius_size="sm", spacing_size="sm").set(
        body_background_fill="*neutral_50", body_text_color_subdued="*neutral_500", body_text_color_subdued_dark="*neutral_400",
        block_border_width="1px", block_shadow="none", block_label_text_weight="500", block_title_text_weight="500",
        block_title_text_size="*text_sm",
        block_info_text_size="*text_xs", layout_gap="10px",
        checkbox_border_color_dark="*neutral_500", slider_color_dark="#3b86d8",
        button_large_text_size="*text_md", button_large_text_weight="500", button_large_padding="6px 14px",
        button_secondary_background_fill="white", button_secondary_border_color="*neutral_300", button_border_width="1px",
        button_secondary_background_fill_dark="*neutral_800", button_secondary_border_color_dark="*neutral_600",
        button_primary_background_fill="#2563a8", button_primary_background_fill_hover="#1d4f87", button_primary_text_color="white",
        button_primary_border_color="#2563a8", button_primary_border_color_dark="#2f74c0",
        button_primary_background_fill_dark="#2f74c0", button_primary_background_fill_hover_dark="#3b86d8")


def css() -> str:
    return (STATIC / "workbench.css").read_text(encoding="utf-8")
