"""Write the judge of emoji-flux: `python assets/build/judge.py` makes `assets/models/emoji-flux/judge.safetensors`.

The comparison of methods asks what an image shows, and the app does not ship the source images. What it ships instead is the
feature space of `evaluate.py`, fitted here to the images in the cache (`images.py`), and every image's features, as float16: a
nearest-image judge needs no more. `--check` says how often float16 changes a verdict.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from common import CACHE_FOLDER, MODEL_FOLDER
from evaluate import fit_judge, project
from images import load_records
from safetensors.numpy import save_file

FILE = MODEL_FOLDER / "judge.safetensors"
FORMAT = "nearest-image-judge-1"


def write_judge(path: Path) -> int:
    """Fit and write; returns the number of source images. Where records have a core, it alone is judged by."""
    records, images = load_records(), np.load(CACHE_FOLDER / "images.npy", mmap_mode="r")
    core = [index for index, record in enumerate(records) if record.get("core", True)]
    judge = fit_judge(np.asarray(images[core]))
    shown = [records[index]["name"] for index in core]
    notes = {"format": FORMAT, "shown": shown, "asked": {records[index]["caption"]: records[index]["name"] for index in core}}
    tensors = {"mean_F": judge.mean_F, "basis_FK": judge.basis_FK, "source_IK": judge.source_IK}
    part = path.with_suffix(".part")
    save_file({name: np.ascontiguousarray(value, dtype=np.float16) for name, value in tensors.items()}, part,
              {"judge": json.dumps(notes, ensure_ascii=False)})
    part.chmod(0o644)
    part.replace(path)
    return len(core)


def check(path: Path) -> None:
    """Every other style of each source, by the stored features and by exact ones: how often do they differ?"""
    from safetensors.numpy import load_file

    records, images = load_records(), np.load(CACHE_FOLDER / "images.npy", mmap_mode="r")
    core = [index for index, record in enumerate(records) if record.get("core", True)]
    exact, stored = fit_judge(np.asarray(images[core])), {name: v.astype(np.float32) for name, v in load_file(path).items()}
    noisy = np.asarray(images[core]).astype(int) + np.random.default_rng(0).integers(-40, 41, (len(core), 128, 128, 3))
    noisy = noisy.clip(0, 255).astype(np.uint8)
    first = (project(noisy, exact.mean_F, exact.basis_FK) @ exact.source_IK.T).argmax(1)
    second = (project(noisy, stored["mean_F"], stored["basis_FK"]) @ stored["source_IK"].T).argmax(1)
    own = np.arange(len(core))
    print(f"noisy sources retrieved: exact {np.mean(first == own):.4f}, stored {np.mean(second == own):.4f}, "
          f"verdicts that differ {int(np.sum(first != second))} of {len(core)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    count = write_judge(FILE)
    print(f"{FILE.name}: {count} source images, {FILE.stat().st_size / 1e6:.2f} MB")
    if options.check:
        check(FILE)


if __name__ == "__main__":
    main()
