"""Prompt files: three formats in, one clear line for everything that cannot be used."""

import json

import pytest

from workbench import prompts
from workbench.options import BadInput

CAPTIONS = ("fluent pizza", 'noto "grinning" face, big', "twemoji rotes Herz ♥")


@pytest.mark.parametrize("name, text", [
    ("a.txt", "\ufeff" + "\r\n".join(["", *CAPTIONS, "  "])),
    ("a.json", json.dumps(CAPTIONS)),
    ("a.CSV", 'id,prompt\n1,fluent pizza\n2,"noto ""grinning"" face, big"\n3,twemoji rotes Herz ♥\n'),
])
def test_each_format_gives_the_same_prompts(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert prompts.read(tmp_path / name) == CAPTIONS


@pytest.mark.parametrize("name, content, message", [
    ("a.txt", b"", "no prompt found"),
    ("a.txt", b"\n \n", "no prompt found"),
    ("a.json", b"[]", "no prompt found"),
    ("a.txt", b"x" * (prompts.MAX_FILE_BYTES + 1), "larger than 1 MB"),
    ("a.txt", b"x\n" * 257, "257 prompts; at most 256"),
    ("a.txt", b"y\n" + b"x" * 5001, "prompt 2 has 5001 characters; at most 5,000"),
    ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
    ("a.txt", b"a\x00b", "control characters"),
    ("a.json", b'{"prompt": "x"}', "list of strings"),
    ("a.json", b"[1, 2]", "list of strings"),
    ("a.json", b"[", "cannot be read"),
    ("a.json", b'["a", " "]', "prompt 2 is empty"),
    ("a.csv", b"caption\nx\n", 'no column "prompt"'),
    ("a.csv", b"prompt,b\n,2\n", "prompt 1 is empty"),
    ("a.csv", b"", 'no column "prompt"'),
    ("a.pt", b"x", ".txt, .csv, .json"),
])
def test_unusable_files_are_refused_with_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=message) as error:
        prompts.read(tmp_path / name)
    assert "\n" not in str(error.value) and name in str(error.value)


def test_a_missing_file_or_a_folder_is_refused(tmp_path):
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(BadInput):
            prompts.read(path)


def test_limits_are_inclusive():
    assert len(prompts.check(["x" * 5000] * 256)) == 256


@pytest.mark.parametrize("name", ["emoji-flux", "general"])
def test_no_prompt_is_in_two_sets_and_each_set_is_large_enough_for_its_stages(root, name):
    """Weights are solved on 16, signs are added up on the next 16, and the comparison has 64 held out."""
    sets = json.loads((root / "assets" / "prompts" / f"{name}.json").read_text(encoding="utf-8"))
    together = [prompt for each in sets.values() for prompt in each]
    assert len(set(together)) == len(together)
    assert len(sets["calibration"]) >= 32 and len(sets["held_out"]) >= 64 and len(sets["showcase"]) >= 12
    assert all(prompts.check(each) == tuple(each) for each in sets.values())


def test_the_general_prompts_are_short_and_long(root):
    sets = json.loads((root / "assets" / "prompts" / "general.json").read_text(encoding="utf-8"))
    for name in ("calibration", "held_out"):
        words = [len(prompt.split()) for prompt in sets[name]]
        assert min(words) == 1 and max(words) > 50 and any('"' in prompt for prompt in sets[name])
