"""Theme and style sheet: system fonts only, so that no page asks for a file from elsewhere."""

from __future__ import annotations

import gradio as gr

SANS = ["system-ui", "-apple-system", "Segoe UI", "Liberation Sans", "DejaVu Sans", "sans-serif"]
MONO = ["ui-monospace", "Cascadia Mono", "Liberation Mono", "DejaVu Sans Mono", "monospace"]


def theme() -> gr.themes.Base:
    return gr.themes.Base(primary_hue="blue", neutral_hue="slate", font=SANS, font_mono=MONO, radius_size="sm", spacing_size="sm").set(
        body_background_fill="*neutral_50", block_border_width="1px", block_shadow="none", block_label_text_weight="500",
        button_large_text_size="*text_md", button_large_text_weight="500", button_large_padding="6px 14px",
        button_primary_background_fill="#2563a8", button_primary_background_fill_hover="#1d4f87", button_primary_text_color="white",
        button_primary_background_fill_dark="#2f74c0", button_primary_background_fill_hover_dark="#3b86d8")


CSS = """
.gradio-container {max-width: 1500px !important; padding: 12px 20px !important;}
.gradio-container > .main {padding: 0 !important;}
#title h1 {font-size: 1.25rem; margin: 0;}
#title p {margin: 0; color: var(--body-text-color-subdued); font-size: .9rem;}
.html-container {padding: 0 !important;}
.block:has(> .html-container > .prose:empty) {display: none;}
#status {position: sticky; top: 0; z-index: 20;}
.status {display: flex; flex-wrap: wrap; align-items: center; gap: 4px 16px; padding: 7px 12px; min-height: 38px;
  border: 1px solid var(--border-color-primary); border-radius: 6px; background: var(--background-fill-primary); font-size: .9rem;}
.status .model {font-weight: 600;}
.status .job {font-variant-numeric: tabular-nums;}
.status .idle {color: var(--body-text-color-subdued);}
.status progress {flex: 1 1 120px; max-width: 340px; height: 8px; appearance: none; border: 0; border-radius: 4px; overflow: hidden;
  background: var(--border-color-primary);}
.status progress::-webkit-progress-bar {background: var(--border-color-primary);}
.status progress::-webkit-progress-value {background: #3a7fc8;}
.status progress::-moz-progress-bar {background: #3a7fc8;}
.notice {margin: 0 !important; padding: 7px 12px; border-radius: 6px; font-size: .92rem; overflow-wrap: anywhere;}
.notice.error {background: #fdecec; color: #8c1d1d; border: 1px solid #f0b4b4;}
.notice.info {background: #e9f3fc; color: #154a7d; border: 1px solid #b5d5f0;}
.dark .notice.error {background: #3b1717; color: #ffc9c9; border-color: #7a2e2e;}
.dark .notice.info {background: #12283d; color: #bfe0ff; border-color: #28527a;}
.notice.plain {padding: 0 2px; color: var(--body-text-color-subdued);}
.scroll {overflow-x: auto; border: 1px solid var(--border-color-primary); border-radius: 4px; padding: 4px 6px;
  background: var(--background-fill-primary);}
table.numbers tr, table.numbers thead, table.numbers tbody {border: 0 !important; background: none !important;}
table.numbers {border-collapse: collapse !important; border: 0 !important; width: 100%; font-size: .88rem;
  font-variant-numeric: tabular-nums;}
table.numbers caption {text-align: left; font-weight: 600; padding: 4px 8px 6px;}
table.numbers th, table.numbers td {text-align: left; padding: 4px 8px !important; border: 0 !important;
  border-bottom: 1px solid var(--border-color-primary) !important;}
table.numbers th {font-weight: 500; color: var(--body-text-color-subdued);}
table.numbers td:nth-child(2) {white-space: nowrap;}
table.numbers td:last-child {color: var(--body-text-color-subdued);}
.badge {margin: 0 !important; padding: 6px 12px; border: 1px dashed var(--border-color-primary); border-radius: 6px; font-size: .9rem;}
.badge b {padding-right: 8px;}
.plot-card {background: var(--background-fill-primary) !important; padding: 6px !important; overflow: hidden;}
.plot-title {font-size: .9rem; font-weight: 600; padding: 2px 4px 0;}
.pixels img {image-rendering: pixelated; object-fit: contain;}
.pixels .image-frame img, .pixels .image-container img {width: 100% !important; height: 100% !important;}
@media (max-width: 640px) {
  .gradio-container {padding: 6px 8px !important;}
  .tab-container button {padding: 0 7px !important; font-size: .86rem !important;}
  table.numbers {font-size: .8rem;}
  table.numbers th, table.numbers td {padding: 3px 4px !important; white-space: normal !important;}
  table.numbers caption {overflow-wrap: anywhere;}
}
"""
