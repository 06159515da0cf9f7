"""Write the judge of emoji-flux: `python assets/build/judge.py` makes `assets/judges/emoji-flux.safetensors`.

The comparison of methods asks what an image shows, and the app does not ship the source images. What it ships instead is the
feature space of `evaluate.py`, fitted here to the images in the cache (`images.py`), and every image's features, as float16: a
nearest-image judge needs no more. `--check` says how often float16 changes a verdict.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from common import BUILD_FOLDER, CACHE_FOLDER
from evaluate import fit_judge, project
from images import load_records
from safetensors.numpy import save_file

FILE = BUILD_FOLDER.parent / "judges" / "emoji-flux.safetensors"
FORMAT = "nearest-image-judge-1"


def write_judge(path: Path) -> int:
    """Fit and write; returns the number of source images."""
    records, images = load_records(), np.load(CACHE_FOLDER / "images.npy", mmap_mode="r")
    judge = fit_judge(np.asarray(images))
    notes = {"format": FORMAT, "shown": [record["name"] for record in records],
             "asked": {record["caption"]: record["name"] for record in records}}
    tensors = {"mean_F": judge.mean_F, "basis_FK": judge.basis_FK, "source_IK": judge.source_IK}
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(".part")
    save_file({name: np.ascontiguousarray(value, dtype=np.float16) for name, value in tensors.items()}, part,
              {"judge": json.dumps(notes, ensure_ascii=False)})
    part.chmod(0o644)
    part.replace(path)
    return len(records)


def check(path: Path) -> None:
    """Every other style of each source, by the stored features and by exact ones: how often do they differ?"""
    from safetensors.numpy import load_file

    records, images = load_records(), np.load(CACHE_FOLDER / "images.npy", mmap_mode="r")
    exact, stored = fit_judge(np.asarray(images)), {name: v.astype(np.float32) for name, v in load_file(path).items()}
    noisy = np.asarray(images).astype(np.int16) + np.random.default_rng(0).integers(-40, 41, images.shape, dtype=np.int16)
    noisy = noisy.clip(0, 255).astype(np.uint8)
    first = (project(noisy, exact.mean_F, exact.basis_FK) @ exact.source_IK.T).argmax(1)
    second = (project(noisy, stored["mean_F"], stored["basis_FK"]) @ stored["source_IK"].T).argmax(1)
    own = np.arange(len(records))
    print(f"noisy sources retrieved: exact {np.mean(first == own):.4f}, stored {np.mean(second == own):.4f}, "
          f"verdicts that differ {int(np.sum(first != second))} of {len(records)}")


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
