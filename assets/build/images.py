"""Fetch the emoji packages and build the captioned image set.

`python assets/build/images.py` writes to the cache folder
- `images.npy`: uint8 (images, 128, 128, 3), transparent pixels composited on white
- `captions.json`: one record per image: caption, style, name, held_out.

"""

import json
import re
import subprocess
import tarfile
from dataclasses import dataclass
from functools import cache

import numpy as np
from common import CACHE_FOLDER, IMAGE_PX, STYLES, write_json
from PIL import Image

PACKAGES = {
    "noto": ("emoji-datasource-google", "16.0.0", "img/google/64/{}.png"),
    "twemoji": ("emoji-datasource-twitter", "16.0.0", "img/twitter/64/{}.png"),
    "fluent": ("@lobehub/fluent-emoji-3d", "1.1.0", "assets/{}.webp"),
}
HELD_OUT_PAIRS = 100
HELD_OUT_SEED = 7

# People and flags need more samples than a CPU build has; component is skin-tone swatches.
DROPPED_CATEGORIES = {"People & Body", "Flags", "Component"}
RENAMED = {
    "heavy black heart": "red heart",
    "slice of pizza": "pizza",
    "electric light bulb": "light bulb",
    "aubergine": "eggplant",
    "hocho": "kitchen knife",
    "black heart suit": "heart suit",
    "black spade suit": "spade suit",
    "black club suit": "club suit",
    "black diamond suit": "diamond suit",
    "white medium star": "star",
    "high voltage sign": "lightning bolt",
    "black sun with rays": "sun with rays",
    "extraterrestrial alien": "alien",
    "robot face": "robot",
    "personal computer": "laptop",
    "black telephone": "telephone",
    "fork and knife with plate": "plate with fork and knife",
    "ear of maize": "corn",
    "black scissors": "scissors",
    "white heavy check mark": "check mark button",
    "heavy check mark": "check mark",
}


@dataclass(frozen=True)
class Emoji:
    """One drawable thing: its name as captions say it, its code points without variation selectors."""

    name: str
    unified: str


def fetch(style: str) -> None:
    """Fetch and unpack the package of `style` unless it is there."""
    name, version, pattern = PACKAGES[style]
    target = CACHE_FOLDER / style
    if target.exists():
        return
    CACHE_FOLDER.mkdir(parents=True, exist_ok=True)
    archive = CACHE_FOLDER / f"{name.strip('@').replace('/', '-')}-{version}.tgz"
    if not archive.exists():
        subprocess.run(["npm", "pack", "--silent", f"{name}@{version}"], cwd=CACHE_FOLDER, check=True)
    wanted = "package/" + pattern.rsplit("/", 1)[0] + "/"
    with tarfile.open(archive) as tar:
        members = [m for m in tar.getmembers() if m.name.startswith(wanted) or m.name.endswith("/emoji.json")]
        tar.extractall(target.with_suffix(".part"), members=members, filter="data")
    target.with_suffix(".part").rename(target)


def spoken_name(name: str) -> str:
    """The caption's words for a Unicode name: lower case, letters and digits only."""
    name = RENAMED.get(name.lower(), name.lower())
    return " ".join(re.sub(r"[^a-z0-9]+", " ", name.replace("’", "").replace("ñ", "n")).split())


def bare(code: str) -> str:
    """Code points without variation selectors, which the packages use differently."""
    return code.lower().replace("-fe0f", "")


def choose() -> list[Emoji]:
    """Every emoji but people, flags and skin tones, in Unicode's order."""
    listing = json.loads((CACHE_FOLDER / "noto" / "package" / "emoji.json").read_text(encoding="utf-8"))
    kept = [entry for entry in sorted(listing, key=lambda e: e["sort_order"]) if entry["category"] not in DROPPED_CATEGORIES]
    return [Emoji(spoken_name(entry["name"]), bare(entry["unified"])) for entry in kept]


@cache
def drawings(style: str) -> dict:
    """Code points -> image file of one style."""
    pattern = PACKAGES[style][2]
    folder = (CACHE_FOLDER / style / "package" / pattern).parent
    return {bare(path.stem): path for path in sorted(folder.glob("*" + pattern[-4:].lstrip("}")))}


def load_image(path) -> np.ndarray:
    """uint8 (128, 128, 3), on white; `path` is a square image with transparency."""
    image = Image.open(path).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    rgb = Image.alpha_composite(white, image).convert("RGB")
    return np.asarray(rgb.resize((IMAGE_PX, IMAGE_PX), Image.Resampling.LANCZOS))


def hold_out(emoji: list[Emoji]) -> set[tuple[str, str]]:
    """`HELD_OUT_PAIRS` (code points, style) pairs, each of another emoji: its other styles are trained on."""
    rng = np.random.default_rng(HELD_OUT_SEED)
    in_all_styles = [item.unified for item in emoji if all(item.unified in drawings(style) for style in STYLES)]
    chosen = rng.choice(in_all_styles, HELD_OUT_PAIRS, replace=False)
    styles = rng.integers(len(STYLES), size=HELD_OUT_PAIRS)
    return {(str(unified), STYLES[int(style)]) for unified, style in zip(chosen, styles, strict=True)}


def load_records() -> list[dict]:
    """One record per image, in the order of images.npy."""
    return json.loads((CACHE_FOLDER / "captions.json").read_text(encoding="utf-8"))


def trained_rows(records: list[dict]) -> list[int]:
    """Indices of the images that the text encoders and the transformer are trained on."""
    return [index for index, record in enumerate(records) if not record["held_out"]]


def main() -> None:
    for style in STYLES:
        fetch(style)
    emoji = choose()
    held_out = hold_out(emoji)
    records, images = [], []
    for style in STYLES:
        files = drawings(style)
        for item in (item for item in emoji if item.unified in files):
            images.append(load_image(files[item.unified]))
            record = {"caption": f"{style} {item.name}", "style": style, "name": item.name}
            records.append(record | {"held_out": (item.unified, style) in held_out})
    np.save(CACHE_FOLDER / "images.npy", np.stack(images))
    write_json(CACHE_FOLDER / "captions.json", records)
    print(f"{len(emoji)} emoji, {len(images)} images, {sum(r['held_out'] for r in records)} held out")


if __name__ == "__main__":
    main()
