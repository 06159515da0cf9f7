"""Command-line flags made from the option fields, and the way back. A setting's default, bounds and help live in `options.py`."""

from __future__ import annotations

import argparse
import re

import annotated_types
from pydantic import ValidationError

from workbench.options import BadInput, Frozen

NONE = "none"
LIMITS = {"at least": annotated_types.Ge, "above": annotated_types.Gt, "at most": annotated_types.Le, "below": annotated_types.Lt}
NOT_FLAGS = ("prompts",)  # read from a file instead


def add(parser: argparse.ArgumentParser, *options: type[Frozen], skip: tuple[str, ...] = ()) -> None:
    """One flag per field. A field that several options share (seed) is one flag that sets them all."""
    known = {action.dest for action in parser._actions}
    for each in options:
        group = parser.add_argument_group(f"{each.__name__}: {(each.__doc__ or '').strip().splitlines()[0].rstrip('.')}")
        for name, field in each.model_fields.items():
            if name in known or name in skip or name in NOT_FLAGS:
                continue
            known.add(name)
            group.add_argument(flag(name), dest=name, metavar="X", default=None, help=_describe(field).replace("%", "%%"))


def read(arguments: argparse.Namespace, options: type[Frozen], **fixed):
    """The options that the flags hold; raises BadInput with one line that names the flag."""
    given = {name: getattr(arguments, name, None) for name in options.model_fields if name not in NOT_FLAGS}
    values = {name: None if value == NONE else value for name, value in given.items() if value is not None}
    try:
        return options.model_validate({**values, **fixed})
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:
            raise BadInput(_plainly(first)) from None
        name = str(first["loc"][0])
        raise BadInput(f"{flag(name)} {given.get(name)}: {_plainly(first)}") from None


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _describe(field) -> str:
    limits = {}
    for rule in field.metadata:
        for word, kind in LIMITS.items():
            if isinstance(rule, kind):
                limits[word] = getattr(rule, kind.__name__.lower())
    default = NONE if field.default is None else field.default
    return "; ".join([str(field.description), *(f"{word} {limit}" for word, limit in limits.items()), f"default {default}"])


def _plainly(error: dict) -> str:
    """A pydantic error for people: the words of a pattern instead of the pattern."""
    if match := re.fullmatch(r"\^\(([\w|]+)\)\$", error.get("ctx", {}).get("pattern", "")):
        return f"use one of {match.group(1).replace('|', ', ')}"
    message = error["msg"].removeprefix("Value error, ")
    return message[0].lower() + message[1:]
