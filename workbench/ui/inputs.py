"""Form components made from the option fields, and the way back. A setting's default, bounds, step and help live in `options.py`."""

from __future__ import annotations

import re
import types
import typing

import annotated_types
import gradio as gr

from workbench.options import GROUP_SIZES, LATENCY_TARGETS, WEIGHT_BITS, Frozen
from workbench.ui import limits

# A slider's box sends every digit that is typed, and gradio answers one out of range with a box of its own over the page. Here the action
# answers, in its screen's line. On the class: a slider whose range changes is made anew for its session, without what an object was given.
gr.Slider.preprocess = lambda self, payload: payload

NONE = "none"
CHOICES = {  # fields whose validator knows a short list
    "group_size": [*GROUP_SIZES, NONE], "weight_bits": list(WEIGHT_BITS), "modulation_bits": list(WEIGHT_BITS),
    "target": list(LATENCY_TARGETS)}
WIDE = 1000  # a slider over a larger range cannot be aimed; use a number box


def build(options: type[Frozen], *names: str) -> dict[str, gr.components.Component]:
    """One component per named field, in that order."""
    return {name: component(options, name) for name in names}


def read(options: type[Frozen], names, values, **fixed):
    """The options that a form holds; raises BadInput with one line."""
    return options.parse({**fixed, **{name: _clean(options, name, value) for name, value in zip(names, values)}}, None)


def prompts(value) -> tuple[str, ...]:
    """The prompts of a table's rows or of a text box: one per row or line, empty ones left out."""
    if isinstance(value, str):
        lines = value.splitlines()
    else:
        lines = [row[0] if isinstance(row, list | tuple) and row else row for row in value or ()]
    return tuple(text for text in (str(line or "").strip() for line in lines) if text)


def bounds(options: type[Frozen], name: str) -> tuple[float | None, float | None]:
    """Smallest and largest value of the control; an excluded limit is left by one step."""
    low = high = None
    field = options.model_fields[name]
    for rule in field.metadata:
        if isinstance(rule, annotated_types.Ge):
            low = rule.ge
        elif isinstance(rule, annotated_types.Gt):
            low = rule.gt + (field.json_schema_extra or {}).get("step", 0)
        elif isinstance(rule, annotated_types.Le):
            high = rule.le
    return low, high


def component(options: type[Frozen], name: str, elem_id: str = "") -> gr.components.Component:
    """The control of one field. Values pass as they are: the options check them, and say in one line what is wrong."""
    control = _control(options, name, elem_id)
    control.preprocess = lambda value: value
    return control


def _control(options: type[Frozen], name: str, elem_id: str) -> gr.components.Component:
    field = options.model_fields[name]
    label = name.replace("_", " ")
    shared = {"info": field.description, "elem_id": elem_id or f"form-{options.__name__}-{name}", "interactive": True}
    choices = CHOICES.get(name) or _choices_of(field)
    if choices:
        default = NONE if field.default is None else field.default
        return gr.Dropdown(choices=choices, value=default, label=label, **shared)
    kinds = typing.get_args(field.annotation) if isinstance(field.annotation, types.UnionType) else (field.annotation,)
    if int in kinds or float in kinds:
        low, high = bounds(options, name)
        high = min(high, limits.here().steps) if name == "steps" else high
        step = (field.json_schema_extra or {}).get("step")
        if low is not None and high is not None and high - low <= WIDE and field.default is not None:
            return gr.Slider(low, high, value=field.default, step=step, label=label, **shared)
        return gr.Number(value=field.default, precision=0 if int in kinds else None, label=label, **shared)
    return gr.Textbox(value=field.default, label=label, **shared)


def _choices_of(field) -> list[str] | None:
    """The words of a pattern such as ^(a|b)$."""
    for rule in field.metadata:
        match = re.fullmatch(r"\^\(([\w|]+)\)\$", getattr(rule, "pattern", None) or "")
        if match:
            return match.group(1).split("|")
    return None


def _clean(options: type[Frozen], name: str, value):
    """A browser sends 4.0 for a whole number and the word none for no group."""
    if value == NONE and options.model_fields[name].default is not NONE and name in CHOICES:
        return None
    return int(value) if isinstance(value, float) and value.is_integer() and options.model_fields[name].annotation is not float else value
