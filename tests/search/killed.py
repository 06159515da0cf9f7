"""A search that is killed at random moments, each time in a child of its own, and then runs to its end. Prints what came out as JSON.

Run as a script: `python killed.py FOLDER SEED`. This process never searches itself before it forks, so the children start clean.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.search.toys import EntangledEvaluator, answer, make_table, run  # noqa: E402
from workbench.checkpoints import Checkpoints  # noqa: E402
from workbench.runs import Run  # noqa: E402

PAUSE_S, KILLS = 0.001, 6


class Slow(EntangledEvaluator):
    def extend(self, state, step, act_bits_L):
        time.sleep(PAUSE_S)
        return super().extend(state, step, act_bits_L)

    def save(self, state):  # a run folder holds safetensors only
        import numpy as np
        from safetensors.numpy import save
        return save({"state": np.frombuffer(super().save(state), dtype=np.uint8)})

    def load(self, blob):
        from safetensors.numpy import load
        return super().load(load(blob)["state"].tobytes())


def searched(folder: Path) -> str:
    checkpoints, table = Checkpoints(Run(folder), "toy"), make_table(6)
    result = run(table, Slow(table), beam=3, refine=4, checkpoint=checkpoints.save, resume=checkpoints.load())
    front, references, chosen, evaluations, events = answer(result)
    plans = [[scored.plan.plan_id, scored.error, scored.origin] for scored in (*front, *references, chosen)]
    return json.dumps([plans, evaluations, events])


def in_a_child(folder: Path, kill_after_s: float | None) -> tuple[int, float]:
    """(exit status, seconds) of a search in a child, which is killed after some seconds or left alone."""
    started, child = time.monotonic(), os.fork()
    if child == 0:
        (folder.parent / f"{folder.name}.json").write_text(searched(folder))
        os._exit(0)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1], time.monotonic() - started


def main(folder: Path, seed: int) -> None:
    _, whole_s = in_a_child(folder / "whole", None)
    moments = random.Random(seed)
    killed = sum(in_a_child(folder / "killed", moments.uniform(0, whole_s / 2))[0] == signal.SIGKILL for _ in range(KILLS))
    status, _ = in_a_child(folder / "killed", None)
    same = (folder / "whole.json").read_text() == (folder / "killed.json").read_text()
    print(json.dumps({"killed": killed, "status": status, "same": same}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
