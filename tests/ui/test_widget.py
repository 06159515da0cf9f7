"""What a browser sends is checked before it is used; the widget asks for nothing from outside."""

import re

import pytest

from workbench.ui import widget


@pytest.mark.parametrize("payload", [
    None, [], "cell", {}, {"row": 0}, {"row": -1, "column": 0}, {"row": 3, "column": 0}, {"row": 0, "column": 4}, {"row": "0", "column": 0},
    {"row": 0.5, "column": 0}, {"row": True, "column": 0}, {"row": float("nan"), "column": 0}, {"row": None, "column": None},
    {"row": 10**30, "column": 0}, {"row": [0], "column": 0},
])
def test_what_is_no_cell_is_ignored(payload):
    assert widget.clicked_cell(payload, rows=3, columns=4) is None


def test_a_cell_inside_is_taken():
    assert widget.clicked_cell({"row": 2, "column": 3, "plan": ""}, rows=3, columns=4) == (2, 3)


@pytest.mark.parametrize("payload", [None, "x", {"list": "front"}, {"plan": ""}, {"plan": 5}, {"plan": ["a"]}, {"plan": "a" * 100}])
def test_what_is_no_plan_is_ignored(payload):
    assert widget.clicked_plan(payload) is None


def test_a_plan_is_known_by_its_id():
    assert widget.clicked_plan({"row": 0, "column": -1, "plan": "0c1d"}) == "0c1d"


def test_the_script_is_the_installed_one_and_nothing_is_fetched():
    plot = widget.plot(elem_id="p", height=100, label="a plot")
    assert widget.plotly_script().is_file()
    assert str(widget.plotly_script()) in plot.head
    scripts = "".join(path.read_text() for path in widget.STATIC.iterdir())
    assert not re.search(r"https?://(?!www.w3.org)", plot.head + plot.html_template + plot.js_on_load + scripts)
    assert "'sendChartToCloud'" in (widget.STATIC / "plot.js").read_text(), "the button that would upload a chart is removed by name"


STROKE = {"part": "steps", "row": 0, "last_row": 0, "column": 0, "last_column": 0}


@pytest.mark.parametrize("change", [
    {"part": "other"}, {"part": None}, {"column": 9, "last_column": 12}, {"column": None}, {"row": "0"}, {"row": True},
    {"row": -5, "last_row": -1},
])
def test_a_stroke_beside_the_map_paints_nothing(change):
    assert widget.painted_cells(STROKE, rows=3, columns=4) is not None
    assert widget.painted_cells(STROKE | change, rows=3, columns=4) is None


def test_a_stroke_is_cut_to_the_map():
    sent = {"part": "steps", "row": -2, "last_row": 1, "column": 2, "last_column": 10**9}
    assert widget.painted_cells(sent, rows=3, columns=4) == ("steps", range(0, 2), range(2, 4))


def test_a_plot_has_a_name_for_those_who_do_not_see_it():
    assert 'aria-label="a plot"' in widget.plot(elem_id="p", height=100, label="a plot").html_template
