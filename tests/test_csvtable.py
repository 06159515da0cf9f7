"""Tables as text: what pandas would guess, drop or rename stays as it is, and what is written is what Python's own writer writes."""

import ast
import csv
import io
from pathlib import Path

import numpy as np
import pytest

from workbench import csvtable, prompts
from workbench.options import BadInput

ROOT = Path(__file__).resolve().parents[1]
ODD = ["NA", "null", "None", "nan", "1e5", "007", "True", "1,000", "#x", "-", "'q'", "1.0"]


def test_cells_are_read_as_the_text_they_are():
    out = io.StringIO()
    csv.writer(out).writerows([["prompt", "prompt", ""], *([word, "", word] for word in ODD)])
    assert csvtable.parse(out.getvalue()).to_numpy().tolist() == [["prompt", "prompt", ""], *([word, "", word] for word in ODD)]
    assert csvtable.parse("a,b\n\n1\n")[1].tolist() == ["b", ""], "a short row ends in an empty cell"


@pytest.mark.parametrize(("text", "words"), [
    ("prompt\na cat, sitting\n", "Expected 1 fields in line 2, saw 2"),
    ("id,prompt\n1,a\n2,b,c\n", "Expected 2 fields in line 3, saw 3"),
    ('prompt\n"a\n', "EOF inside string"),
    ("prompt" + "," * 200_000, "more than 50,000 commas"),
])
def test_a_table_that_cannot_be_read_says_why_in_one_line(tmp_path, text, words):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(BadInput, match=words) as error:
        prompts.read(tmp_path / "a.csv")
    assert "\n" not in str(error.value) and "a.csv cannot be read: " in str(error.value)


def test_prompts_of_a_table_are_its_texts(tmp_path):
    (tmp_path / "a.csv").write_text("\ufeffid, Prompt ,prompt\n" + "\n".join(f'{n},"{word}",other' for n, word in enumerate(ODD)), "utf-8")
    assert prompts.read(tmp_path / "a.csv") == tuple(ODD)
    (tmp_path / "b.csv").write_bytes(b"prompt\na\x00b\n")
    with pytest.raises(BadInput, match="control characters"):
        prompts.read(tmp_path / "b.csv")


def test_written_tables_are_those_of_pythons_own_writer():
    header = ["a", "a", "b,c", ""]
    rows = [[1, 2.5, None, "x,y"], ["", "NA", 'q"x', "two\nlines"], [True, float("nan"), np.float32(0.1), np.float64(1e-7)],
            [1e300, -0.0, "ü", " s "]]
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([header, *rows])
    assert csvtable.write(header, rows) == out.getvalue()
    assert csvtable.write(["a", "b"], []) == "a,b\n"


def test_no_other_module_reads_or_writes_csv_by_itself():
    for path in (ROOT / "workbench").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        assert "csv" not in names, path
        assert path.name == "csvtable.py" or "pandas" not in names, path
