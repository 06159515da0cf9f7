"""Every name that the glossary gives a word is a name of the code."""

import ast

import pytest

SOURCES = ("workbench", "kernels")


def rows(text: str) -> list[tuple[str, list[str]]]:
    """(word, names in the code) of every row of the glossary's tables."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [(word, [name.strip("` ") for name in names.split(",")]) for word, names, _ in cells if word != "word" and set(word) != {"-"}]


def names_of(source: str) -> set[str]:
    """Everything a source defines: functions, classes, arguments, fields, variables."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


@pytest.fixture(scope="module")
def defined(root) -> set[str]:
    files = [path for folder in SOURCES for path in (root / folder).rglob("*.py")]
    return {path.stem for path in files}.union(*(names_of(path.read_text(encoding="utf-8")) for path in files))


def test_every_name_of_the_glossary_exists_in_the_code(root, defined):
    found = rows((root / "docs" / "glossary.md").read_text(encoding="utf-8"))
    assert len(found) > 40 and len(found) == len({word for word, _ in found}), "a word stands once"
    assert [name for _, names in found for name in names if name not in defined] == []


def test_a_name_that_is_gone_is_noticed():
    assert names_of("class Ledger:\n    size: int = 0\n\ndef steer(table, *, lean=1): best = 2") == {
        "Ledger", "size", "steer", "table", "lean", "best"}
    assert rows("| word | in the code | meaning |\n|---|---|---|\n| a b | `A`, `b` | it |") == [("a b", ["A", "b"])]


def test_no_name_of_the_house_that_has_a_term_of_the_field_came_back(defined):
    gone = {"Ledger", "ledger", "Meter", "meters", "Steering", "steer", "rungs", "companions", "beside", "Entrant", "told_by", "_Joined",
            "joint", "Kept", "LastInput", "memo",
            "in_turns", "anew", "HELD", "QUIET", "BUSY", "flux_lean", "outline", "verbs", "peers", "picks"}
    assert defined & gone == set()
