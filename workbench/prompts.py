"""Prompts from a file: one per line of a .txt, the column "prompt" of a .csv, or a .json list of strings."""

from __future__ import annotations

import json
from pathlib import Path

from workbench import csvtable
from workbench.options import MAX_PROMPT_CHARACTERS, BadInput

MAX_FILE_BYTES = 1_000_000
MAX_PROMPTS = 256


def read(path: str | Path) -> tuple[str, ...]:
    """The prompts of a file; raises BadInput with one line when they cannot be used."""
    path = Path(path)
    if path.suffix.lower() not in PARSERS:
        raise BadInput(f"{path.name}: prompts are read from {', '.join(PARSERS)} files")
    if not path.is_file():
        raise BadInput(f"{path}: no such prompt file")
    with path.open("rb") as file:  # Reads one byte more than allowed, so a huge file is never read whole.
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise BadInput(f"{path.name} is larger than {MAX_FILE_BYTES / 1e6:.0f} MB; prompt files may not be")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadInput(f"{path.name} is not UTF-8 text") from None
    try:
        return check(PARSERS[path.suffix.lower()](text), path.name)
    except (ValueError, RecursionError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{path.name} cannot be read: {error}") from None


def parse_lines(text: str) -> tuple[str, ...]:
    """One prompt per line, as typed into a form or a .txt file; blank lines are skipped."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def check(prompts, label: str = "prompts") -> tuple[str, ...]:
    """The same prompts, if there are few enough of them and none is empty or too long."""
    prompts = tuple(prompts)
    if not prompts:
        raise BadInput(f"{label}: no prompt found; give 1 to {MAX_PROMPTS}, one per line")
    if len(prompts) > MAX_PROMPTS:
        raise BadInput(f"{label}: {len(prompts)} prompts; at most {MAX_PROMPTS} are allowed")
    for number, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            raise BadInput(f"{label}: prompt {number} is empty")
        if len(prompt) > MAX_PROMPT_CHARACTERS:
            raise BadInput(f"{label}: prompt {number} has {len(prompt)} characters; at most {MAX_PROMPT_CHARACTERS:,} are allowed")
        if not prompt.isprintable():
            raise BadInput(f"{label}: prompt {number} contains control characters; prompts are plain text")
    return prompts


def _parse_csv(text: str) -> tuple[str, ...]:
    rows = csvtable.parse(text)
    column = next((number for number, name in enumerate(rows.iloc[0] if len(rows) else ()) if name.strip().lower() == "prompt"), None)
    if column is None:
        raise ValueError('its first line names no column "prompt"')
    return tuple(prompt.strip() for prompt in rows[column].iloc[1:])


def _parse_json(text: str) -> tuple[str, ...]:
    prompts = json.loads(text)
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("it must be one list of strings")
    return tuple(prompt.strip() for prompt in prompts)


PARSERS = {".txt": parse_lines, ".csv": _parse_csv, ".json": _parse_json}
