"""A Plotly figure in a `gr.HTML` component: it keeps its DOM node and zoom across updates and reports clicks.

`gr.Plot` can do neither. plotly.min.js comes from the installed plotly package, so nothing is fetched from elsewhere.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import gradio as gr

ID_LENGTH = 64

_ON_LOAD = """
const P = window.Plotly;
const node = element.querySelector('.plot');
const config = {displaylogo: false, responsive: false, scrollZoom: false,
                modeBarButtonsToRemove: ['sendChartToCloud', 'sendDataToCloud', 'lasso2d', 'select2d']};
let wired = false, missed = false;

function painted(layout) {
  const css = getComputedStyle(element);
  const ink = css.getPropertyValue('--body-text-color').trim() || '#222';
  const rule = css.getPropertyValue('--border-color-primary').trim() || '#ddd';
  const out = {...layout, paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)',
               font: {color: ink, family: css.fontFamily, size: 12}, autosize: true, height: node.clientHeight,
               modebar: {bgcolor: 'rgba(0,0,0,0)', color: ink}};
  for (const key of Object.keys(out)) {
    if (/^[xy]axis/.test(key)) out[key] = {gridcolor: rule, zerolinecolor: rule, linecolor: rule, ...out[key]};
  }
  return out;
}

function clicked(event) {
  const point = event.points && event.points[0];
  if (!point) return;
  const index = Array.isArray(point.pointIndex) ? point.pointIndex : [point.pointNumber, -1];
  const custom = Array.isArray(point.customdata) ? point.customdata : [];
  trigger('cell_click', {row: index[0], column: index[1], list: String(custom[0] ?? ''), index: Number(custom[1] ?? -1)});
}

function draw() {
  const figure = props.value;
  if (!P || !figure || !figure.data) return;
  missed = !node.clientWidth;  // on a hidden screen: drawn when it is shown
  if (missed) return;
  P.react(node, figure.data, painted(figure.layout), config).then(() => {
    if (!wired) { wired = true; node.on('plotly_click', clicked); }
  });
}

watch('value', draw);
draw();
let width = node.clientWidth;
new ResizeObserver(() => {
  const stale = node.clientWidth && (missed || node.clientWidth !== width);
  if (!stale) return;
  width = node.clientWidth;
  draw();
  if (wired) P.Plots.resize(node);
}).observe(node);
new MutationObserver(draw).observe(document.body, {attributes: true, attributeFilter: ['class']});
"""


def plotly_script() -> Path:
    """plotly.min.js of the installed package, found without importing it."""
    spec = importlib.util.find_spec("plotly")
    return Path(spec.submodule_search_locations[0]) / "package_data" / "plotly.min.js"


def plot(value: dict | None = None, *, elem_id: str, height: int, label: str) -> gr.HTML:
    """`value` is a figure dict of `figures.py`. Clicks arrive as the event `cell_click`; read them with `clicked_cell`.

    A function, since Gradio writes a stub file beside every subclass of its components."""
    gr.set_static_paths([plotly_script().parent])
    template = (f'<div class="plot-title">{label}</div>'
                f'<div class="plot" role="img" aria-label="{label}" style="height:{height}px;width:100%"></div>')
    return gr.HTML(value, elem_id=elem_id, html_template=template, js_on_load=_ON_LOAD, container=True, elem_classes=["plot-card"],
                   head=f'<script src="/gradio_api/file={plotly_script()}"></script>')


def _whole(value, limit: int) -> int | None:
    """An index below `limit`; what a browser sends is not trusted."""
    good = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < limit
    return value if good else None


def clicked_cell(payload, rows: int, columns: int) -> tuple[int, int] | None:
    """(row, column) of a clicked heatmap, or None if the payload is not a cell of it."""
    payload = payload if isinstance(payload, dict) else {}
    row, column = _whole(payload.get("row"), rows), _whole(payload.get("column"), columns)
    return None if row is None or column is None else (row, column)


def clicked_point(payload, lengths: dict[str, int]) -> tuple[str, int] | None:
    """(list, index) of a clicked point, or None. `lengths` gives the known lists and how many points they have."""
    payload = payload if isinstance(payload, dict) else {}
    name = payload.get("list")
    if not isinstance(name, str) or name[:ID_LENGTH] not in lengths:
        return None
    index = _whole(payload.get("index"), lengths[name])
    return None if index is None else (name, index)
