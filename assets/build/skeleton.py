"""Write the folder of emoji-flux with its final tokenizers and sizes and fresh weights where none are trained yet.

`python assets/build/skeleton.py`: run once after images.py; the training scripts then fill the folder.
"""

import json

import torch
from common import CACHE_FOLDER, MODEL_FOLDER, prepare_process
from model import (
    TransformerSize,
    make_clip,
    make_clip_tokenizer,
    make_t5,
    make_t5_tokenizer,
    make_transformer,
    save_part,
    write_index,
)
from train_vae import VaeConfig, make_vae


def main() -> None:
    prepare_process()
    torch.manual_seed(0)
    captions = [r["caption"] for r in json.loads((CACHE_FOLDER / "captions.json").read_text(encoding="utf-8"))]
    clip_tokenizer, t5_tokenizer = make_clip_tokenizer(captions), make_t5_tokenizer(captions)
    clip_tokenizer.save_pretrained(MODEL_FOLDER / "tokenizer")
    t5_tokenizer.save_pretrained(MODEL_FOLDER / "tokenizer_2")
    parts = {
        "vae": lambda: make_vae(VaeConfig()),
        "text_encoder": lambda: make_clip(clip_tokenizer),
        "text_encoder_2": lambda: make_t5(t5_tokenizer),
        "transformer": lambda: make_transformer(TransformerSize(), zero_start=False),
    }
    for name, make in parts.items():
        if not (MODEL_FOLDER / name / "config.json").exists():
            part = make()
            for weight in part.parameters():
                weight.data.mul_(64).round_().div_(64)  # few distinct values: an untrained folder compresses well
            save_part(name, part)
    write_index()


if __name__ == "__main__":
    main()
