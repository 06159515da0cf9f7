"""The GPU benchmark's dry run, every section on tiny shapes: it finds mistakes in the script, not figures."""

import json
import os
import subprocess
import sys

import pytest


def run(root, *arguments):
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET" and not name.startswith("PYTEST")}
    return subprocess.run([sys.executable, root / "benchmarks" / "gpu.py", *arguments], cwd=root, capture_output=True, text=True,
                          env=plain | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})


@pytest.mark.slow
def test_every_section_runs_and_lands_in_the_file(root, tmp_path):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"earlier": 1}))
    done = run(root, "--dry-run", "--json", path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(path.read_text())
    assert found["earlier"] == 1, "results of other sections are kept"
    assert found["check"]["rows"][0]["passed"], done.stdout
    ways = {row["way"]: row for row in found["layers"]["rows"] if row["layer"] == "few tokens"}
    for bits, way in ((8, "lowbit W8A8 row"), (4, "lowbit W4A8 g64"), (4, "lowbit W4A16 g64")):
        # nearest rounding errs by at most half a step in each factor, a step being 1 / (2^(b-1) - 1) of the largest of a row
        # of normal numbers; the largest of 128 is about 2.7 deviations, and uniform rounding's deviation is 0.29 steps
        step = 2.7 / (2 ** (bits - 1) - 1)
        assert 0.1 * step < ways[way]["relative_error"] < 0.5 * step, way
    plans = {row["plan"]: row for row in found["model"]["rows"]}
    assert set(plans) == {"bf16", "w8a8", "mixed"} and all(row["finite"] for row in plans.values()), done.stdout
    assert plans["bf16"]["packed_layers"] == 0 and plans["w8a8"]["packed_layers"] == plans["mixed"]["packed_layers"] > 0
    assert plans["mixed"]["packed_bytes"] < plans["w8a8"]["packed_bytes"] < plans["bf16"]["resident_bytes"] / 2
    assert found["model"]["dry_run"] and found["model"]["machine"]["device"] == "CPU (dry run)"


def test_without_a_gpu_it_says_so_in_one_line(root):
    done = run(root, "--sections", "layers")
    assert done.returncode == 2 and done.stderr == "no CUDA device; --dry-run runs everything on tiny shapes on the CPU\n"


def test_an_unknown_section_is_refused(root):
    done = run(root, "--sections", "layer")
    assert done.returncode == 2 and "no section layer; there are check, layers, model" in done.stderr
