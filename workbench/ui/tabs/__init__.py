"""One module per screen: layout and wiring only."""

from __future__ import annotations

from dataclasses import dataclass

import gradio as gr

from workbench.options import Frozen
from workbench.ui import tables
from workbench.ui.bindings import Page


@dataclass(frozen=True)
class TabInputs:
    """The components of one options type, by field name."""

    options: type[Frozen]
    components: dict[str, gr.components.Component]

    @property
    def inputs(self) -> list:
        return list(self.components.values())


def notice_line(page: Page, tab: str) -> None:
    """The screen's one line for what went wrong or well."""
    line = gr.HTML(elem_id=f"notice-{tab}")
    page.show(line, [f"notice-{tab}"], lambda s: tables.notice(*s.notices.get(tab, ("", ""))))
