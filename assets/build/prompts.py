"""Write the prompt sets of emoji-flux: calibration, held_out (both seeded draws of trained captions) and showcase.

The three sets share no emoji. "Held out" here means kept from calibration and search; every prompt was trained on.
"""

import numpy as np
from common import PROMPTS_FILE, write_json
from images import load_records, trained_rows

SEED = 11
CALIBRATION, HELD_OUT = 32, 64
MOST_WORDS = 4
SHOWCASE = (
    "fluent pizza",
    "noto grinning face",
    "twemoji red heart",
    "fluent rocket",
    "noto penguin",
    "twemoji sunflower",
    "fluent hamburger",
    "noto red apple",
    "twemoji crescent moon",
    "fluent octopus",
    "noto birthday cake",
    "twemoji smiling face with sunglasses",
)


def main() -> None:
    records = load_records()
    trained = {records[row]["caption"]: records[row]["name"] for row in trained_rows(records)}
    missing = [caption for caption in SHOWCASE if caption not in trained]
    if missing:
        raise ValueError(f"showcase captions that were not trained on: {missing}")
    shown = {trained[caption] for caption in SHOWCASE}
    by_name: dict[str, list[str]] = {}
    for caption, name in trained.items():
        if name not in shown and len(caption.split()) <= MOST_WORDS:
            by_name.setdefault(name, []).append(caption)
    rng = np.random.default_rng(SEED)
    names = rng.permutation(sorted(by_name))[: CALIBRATION + HELD_OUT]
    drawn = [by_name[name][rng.integers(len(by_name[name]))] for name in names]
    sets = {"calibration": drawn[:CALIBRATION], "held_out": drawn[CALIBRATION:], "showcase": list(SHOWCASE)}
    write_json(PROMPTS_FILE, sets)


if __name__ == "__main__":
    main()
