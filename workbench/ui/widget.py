"""Components of our own on top of `gr.HTML`: a Plotly figure that keeps its node and zoom, and HTML whose parts can be picked.

`gr.Plot` rebuilds its node with every update and reports no clicks. The scripts are files of this package and of the installed plotly
package, so nothing is fetched from elsewhere. What a browser sends is checked here before anything uses it.
"""

from __future__ import annotations

import importlib.util
from html import escape
from pathlib import Path

import gradio as gr

ID_LENGTH = 64
STATIC = Path(__file__).parent / "static"
# The names of events must stand here in quotes: gradio looks for them in this text.
_PLOT = "window.adatsqPlot(element, props, watch, {click: (sent) => trigger('cell_click', sent)});"
_PAINTABLE = (
    "window.adatsqPlot(element, props, watch, {click: (sent) => trigger('cell_click', sent), paint: (sent) => trigger('paint', sent)});"
)
_PICKER = "window.adatsqPicker(element, watch, (sent) => trigger('pick', sent));"


def plotly_script() -> Path:
    """plotly.min.js of the installed package, found without importing it."""
    spec = importlib.util.find_spec("plotly")
    return Path(spec.submodule_search_locations[0]) / "package_data" / "plotly.min.js"


def served(path: Path) -> str:
    """Address of a file of ours, new whenever the file is: a browser may keep what it has."""
    gr.set_static_paths([path.parent])
    return f"/gradio_api/file={path}?v={int(path.stat().st_mtime)}"


def scripts(*paths: Path) -> str:
    """Tags for the page's head, in this order."""
    return "".join(f'<script src="{served(path)}"></script>' for path in paths)


def early(upload_mb: int) -> str:
    """What the page's head must hold from the first moment."""
    return f"<script>window.adatsqUploadMB = {upload_mb};{(STATIC / 'early.js').read_text(encoding='utf-8')}</script>"


def plot(value: dict | None = None, *, elem_id: str, height: int, label: str, paintable: bool = False, described_by: str = "") -> gr.HTML:
    """`value` is a figure dict of `figures.py`. Clicks arrive as the event `cell_click` (read them with `clicked_cell`), painted
    rectangles as `paint` (read them with `painted_cells`). described_by: id of the element that says in words what it shows.

    A function, since Gradio writes a stub file beside every subclass of its components."""
    told = f' aria-describedby="{escape(described_by)}"' if described_by else ""
    template = (
        f'<div class="plot-title">{escape(label)}</div>'
        f'<div class="plot" role="img" aria-label="{escape(label)}"{told} style="height:{height}px;width:100%"></div>'
    )
    return gr.HTML(
        value,
        elem_id=elem_id,
        html_template=template,
        js_on_load=_PAINTABLE if paintable else _PLOT,
        container=True,
        elem_classes=["plot-card"],
        head=scripts(plotly_script(), STATIC / "plot.js"),
    )


def picker(elem_id: str, value: str = "", **more) -> gr.HTML:
    """HTML made by `tables.py`; an element with data-pick sends its JSON as the event `pick` when clicked, or with Enter."""
    return gr.HTML(value, elem_id=elem_id, js_on_load=_PICKER, head=scripts(STATIC / "picker.js"), padding=False, **more)


def _whole(value, limit: int) -> int | None:
    """An index below `limit`; what a browser sends is not trusted."""
    good = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < limit
    return value if good else None


def clicked_cell(payload, rows: int, columns: int) -> tuple[int, int] | None:
    """(row, column) of a clicked heatmap, or None if the payload is not a cell of it."""
    payload = payload if isinstance(payload, dict) else {}
    row, column = _whole(payload.get("row"), rows), _whole(payload.get("column"), columns)
    return None if row is None or column is None else (row, column)


def clicked_plan(payload) -> str | None:
    """The id of a clicked point's plan, or None where there is none to choose."""
    name = payload.get("plan") if isinstance(payload, dict) else None
    return name if isinstance(name, str) and 0 < len(name) <= ID_LENGTH else None


def painted_cells(payload, rows: int, columns: int) -> tuple[str, range, range] | None:
    """("weights" or "steps", rows, columns) of a painted rectangle cut to the map, or None if nothing of it is inside."""
    payload = payload if isinstance(payload, dict) else {}
    corners = [payload.get(name) for name in ("row", "last_row", "column", "last_column")]
    part = payload.get("part")
    if part not in ("weights", "steps") or not all(isinstance(c, int) and not isinstance(c, bool) for c in corners):
        return None
    top, bottom, left, right = corners
    inside = (range(max(0, top), min(bottom, rows - 1) + 1), range(max(0, left), min(right, columns - 1) + 1))
    return (part, *inside) if all(inside) else None


def picked(payload, name: str, limit: int) -> int | None:
    """An index that a picked element carries under `name`, or None."""
    return _whole(payload.get(name), limit) if isinstance(payload, dict) else None


_VIEWER_TEMPLATE = """<div class="viewer nothing">
<div class="bar"><div class="modes" role="group" aria-label="how to compare"></div>
<label class="gain" hidden>gain <input type="range" min="1" max="64" step="1" aria-label="gain of the difference"><output></output></label>
<button type="button" class="reset" title="zoom and position as at first">Reset view</button></div>
<div class="stage"><canvas tabindex="0" role="img"></canvas><p class="nothing-yet"></p></div>
<p class="help"></p>
<div class="vote" hidden><button type="button" data-choice="a">A looks better</button><button type="button" data-choice="same">No difference
</button><button type="button" data-choice="b">B looks better</button><span class="tally" role="status"></span></div>
<p class="caption" role="status"></p>
<label class="scrub" hidden>denoising step
<input type="range" min="0" max="0" step="1" aria-label="denoising step"><output></output></label>
</div>"""


def viewer(elem_id: str) -> gr.HTML:
    """Two images compared on one canvas; `value` is made by `views.compare.viewer`. What the visitor does arrives as the event `look`."""
    return gr.HTML(
        None,
        elem_id=elem_id,
        html_template=_VIEWER_TEMPLATE,
        head=scripts(STATIC / "viewer.js"),
        container=True,
        elem_classes=["plot-card"],
        js_on_load="window.adatsqViewer(element, props, watch, (sent) => trigger('look', sent));",
    )
