"""Train the two text encoders of emoji-flux on caption -> latent, then freeze them.

A transformer that learns what its captions mean and how to denoise at the same time spends most of its samples on the
first. So each encoder first learns to predict the image's latents from the caption, through a reader that is thrown
away: the T5 tokens through one cross-attention layer (position queries, as the transformer will read them), the pooled
CLIP vector through one linear map to principal components. The transformer then finds nearly linear read-outs.

`python assets/build/train_text.py --minutes 11` trains (or goes on training) and writes `text_encoder/` and `text_encoder_2/`.

Letters: B batch, S text tokens (16), D text channels (256), M image tokens (64), C channels of one (64), P components.
"""

import argparse
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from common import CACHE_FOLDER, MAX_TOKENS, MODEL_FOLDER, prepare_process, save_state
from images import load_records, trained_rows
from model import make_clip, make_t5, save_part
from muon import Muon
from torch import nn
from transformers import CLIPTokenizer, T5Tokenizer

STATE_FILE = CACHE_FOLDER / "text_state.pt"


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Pooled targets: `components` principal components, each divided by its deviation to the power `whitening`."""

    batch: int = 160
    matrix_lr: float = 0.02
    other_lr: float = 6e-3
    warmup_steps: int = 20
    components: int = 192
    whitening: float = 0.5
    reader_heads: int = 8
    seed: int = 0


class LayoutReader(nn.Module):
    """Throw-away: 64 learned position queries read the text tokens (B, S, D) and predict image tokens (B, M, C)."""

    def __init__(self, heads: int, channels: int = 256, image_tokens: int = 64, out_channels: int = 64):
        super().__init__()
        self.heads = heads
        self.query_MD = nn.Parameter(torch.randn(image_tokens, channels))
        self.key_value = nn.Linear(channels, 2 * channels)
        self.out = nn.Linear(channels, channels)
        wide = 2 * channels
        self.mlp = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, wide), nn.GELU(), nn.Linear(wide, channels))
        self.head = nn.Linear(channels, out_channels)

    def forward(self, text_BSD: torch.Tensor) -> torch.Tensor:
        query = self.query_MD.expand(len(text_BSD), -1, -1).unflatten(2, (self.heads, -1)).transpose(1, 2)
        key, value = self.key_value(text_BSD).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weight = torch.softmax(query.to(key.dtype) @ key.transpose(2, 3) * key.shape[-1] ** -0.5, dim=-1)
        read = weight.to(value.dtype) @ value  # the fused kernel's backward pass is slow on a CPU at 16 keys
        hidden = self.out(read.transpose(1, 2).flatten(2)) + self.query_MD
        return self.head(hidden + self.mlp(hidden))


class TextTower(nn.Module):
    """Both encoders with their throw-away readers."""

    def __init__(self, clip_tokenizer: CLIPTokenizer, t5_tokenizer: T5Tokenizer, config: TextConfig):
        super().__init__()
        self.clip, self.t5 = make_clip(clip_tokenizer), make_t5(t5_tokenizer)
        self.clip.set_attn_implementation("eager")
        self.reader = LayoutReader(config.reader_heads)
        self.components = nn.Linear(256, config.components)

    def forward(self, clip_ids_BS: torch.Tensor, t5_ids_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Predicted image tokens (B, M, C) and components (B, P); padding is attended to, as in FluxPipeline."""
        pooled = self.clip(clip_ids_BS).pooler_output
        tokens = self.t5(t5_ids_BS)[0]
        return self.reader(tokens), self.components(pooled)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """(images, 16, 16, 16) -> image tokens (images, M, C) in FluxPipeline's 2 x 2 order."""
    count, channels, height, width = latents.shape
    grid = latents.reshape(count, channels, height // 2, 2, width // 2, 2)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(count, height * width // 4, channels * 4)


def component_targets(tokens: torch.Tensor, trained: torch.Tensor, config: TextConfig) -> torch.Tensor:
    """Half-whitened principal components (images, P) of the image tokens, scaled to mean square 1."""
    flat = tokens.flatten(1)
    flat = flat - flat[trained].mean(0)
    _, _, basis = torch.svd_lowrank(flat[trained], q=config.components, niter=4)
    scores = flat @ basis
    scores = scores / scores[trained].std(0) ** config.whitening
    return scores / scores[trained].square().mean().sqrt()


def load_tokenizers() -> tuple[CLIPTokenizer, T5Tokenizer]:
    """The saved tokenizers: a freshly built one can cut words differently from its reloaded self."""
    clip = CLIPTokenizer.from_pretrained(MODEL_FOLDER / "tokenizer", local_files_only=True)
    return clip, T5Tokenizer.from_pretrained(MODEL_FOLDER / "tokenizer_2", local_files_only=True)


def token_ids(captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (captions, 16) of both tokenizers, as loaded from the model folder: the ids a pipeline will see."""
    options = {"padding": "max_length", "max_length": MAX_TOKENS, "truncation": True, "return_tensors": "pt"}
    clip, t5 = load_tokenizers()
    return clip(captions, **options).input_ids, t5(captions, **options).input_ids


def make_optimizers(tower: TextTower, config: TextConfig) -> list[torch.optim.Optimizer]:
    """Muon for the encoders' matrices, Adam for embeddings, norms and readers."""
    matrices, others = [], []
    for name, weight in tower.named_parameters():
        inner = weight.ndim == 2 and name.startswith(("clip.", "t5.")) and "embed" not in name and "shared" not in name
        (matrices if inner and "relative_attention_bias" not in name else others).append(weight)
    return [
        Muon(matrices, lr=config.matrix_lr),
        torch.optim.AdamW(others, lr=config.other_lr, betas=(0.9, 0.95), weight_decay=0.0, foreach=True),
    ]


def train(tower: TextTower, ids: tuple, targets: tuple, trained: torch.Tensor, config: TextConfig, minutes: float) -> None:
    """Half of the time at full rate, then linear decay. `ids`, `targets`: per image, in the order of captions.json."""
    (clip_ids, t5_ids), (tokens, components) = ids, targets
    optimizers = make_optimizers(tower, config)
    generator = torch.Generator().manual_seed(config.seed)
    start, step, order = time.time(), 0, torch.empty(0, dtype=torch.long)
    seen: list[tuple[float, float]] = []
    while (progress := (time.time() - start) / max(minutes * 60, 1e-3)) < 1:
        if len(order) < config.batch:
            order = trained[torch.randperm(len(trained), generator=generator)]
        batch, order = order[: config.batch], order[config.batch :]
        with torch.autocast("cpu", torch.bfloat16):
            out_tokens, out_components = tower(clip_ids[batch], t5_ids[batch])
        token_loss = F.mse_loss(out_tokens.float(), tokens[batch])
        component_loss = F.mse_loss(out_components.float(), components[batch])
        factor = min(1.0, (step + 1) / config.warmup_steps, 0.01 + 2 * (1 - progress))
        for optimizer, peak_lr in zip(optimizers, (config.matrix_lr, config.other_lr), strict=True):
            optimizer.param_groups[0]["lr"] = peak_lr * factor
            optimizer.zero_grad(set_to_none=True)
        (token_loss + component_loss).backward()
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        seen.append((token_loss.item(), component_loss.item()))
        if step % 25 == 0:
            t5_error, clip_error = np.mean(seen[-25:], axis=0)
            rate = step * config.batch / (time.time() - start)
            print(f"step {step}  t5 {t5_error:.4f}  clip {clip_error:.4f}  {rate:.0f} captions/s", flush=True)
    save_state(STATE_FILE, tower.state_dict())


@torch.inference_mode()
def errors_of(tower: TextTower, ids: tuple, targets: tuple, rows: torch.Tensor) -> tuple[float, float]:
    """Mean squared errors of the image tokens and of the components over `rows`."""
    tokens, components = zip(*(tower(ids[0][batch], ids[1][batch]) for batch in rows.split(256)), strict=True)
    return (
        F.mse_loss(torch.cat(tokens), targets[0][rows]).item(),
        F.mse_loss(torch.cat(components), targets[1][rows]).item(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=9)
    minutes = parser.parse_args().minutes
    prepare_process()
    config = TextConfig()
    torch.manual_seed(config.seed)
    records = load_records()
    trained = torch.tensor(trained_rows(records))
    held_out = torch.tensor([index for index, record in enumerate(records) if record["held_out"]])
    tokens = pack(torch.load(CACHE_FOLDER / "latents.pt", weights_only=True)["latents"]).float()
    targets = (tokens, component_targets(tokens, trained, config))
    ids = token_ids([r["caption"] for r in records])
    tower = TextTower(*load_tokenizers(), config)
    if STATE_FILE.exists():
        tower.load_state_dict(torch.load(STATE_FILE, weights_only=True))
    train(tower, ids, targets, trained, config, minutes)
    tower.eval()
    for name, rows in (("trained", trained), ("held out", held_out)):
        errors = errors_of(tower, ids, targets, rows)
        spread = targets[0][rows].var().item()
        print(f"{name}: latent mse {errors[0]:.4f} of variance {spread:.3f}, components mse {errors[1]:.4f}")
    save_part("text_encoder", tower.clip)
    save_part("text_encoder_2", tower.t5)


if __name__ == "__main__":
    main()
