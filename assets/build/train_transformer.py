"""Train the transformer of emoji-flux by flow matching on cached latents and frozen prompt embeddings.

`python assets/build/train_transformer.py --minutes 90 --decay-minutes 20`
goes on from `transformer_state.pt` in the cache, else from the weights in the model folder (`--fresh` starts anew).
It saves its state every few minutes and the averaged weights to the model folder at the end; `--export` only does that.

Straight paths: x_sigma = (1 - sigma) x + sigma noise, the network predicts noise - x, and is told sigma (FluxPipeline
passes timestep / 1000). Letters: B batch, M image tokens (64), C channels (64), S text tokens (16), D channels (256).
"""

import argparse
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from common import CACHE_FOLDER, MODEL_FOLDER, prepare_process, save_state
from diffusers import FluxTransformer2DModel
from fast_attention import FastAttention
from images import load_records, trained_rows
from model import TransformerSize, make_transformer, save_part
from muon import Muon
from train_text import pack, token_ids
from transformers import CLIPTextModel, T5EncoderModel

STATE_FILE = CACHE_FOLDER / "transformer_state.pt"


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """Sigma is logit-normal (mean, std) with probability 1 - `uniform_share`: most weight where a caption becomes a layout."""

    batch: int = 64
    matrix_lr: float = 0.02
    other_lr: float = 3e-3
    warmup_steps: int = 50
    ema: float = 0.995
    sigma_mean: float = 0.4
    sigma_std: float = 1.1
    uniform_share: float = 0.25
    save_every_s: int = 240
    seed: int = 0


@dataclass(frozen=True)
class TrainingSet:
    """Rows of captions.json that are trained on: latents_IMC, text_ISD and pooled_ID, all float32."""

    latents_IMC: torch.Tensor
    text_ISD: torch.Tensor
    pooled_ID: torch.Tensor


@torch.inference_mode()
def load_set() -> TrainingSet:
    """Latents from the cache, embeddings from the encoders as they are saved in the model folder."""
    records = load_records()
    keep = torch.tensor(trained_rows(records))
    clip_ids, t5_ids = (ids[keep] for ids in token_ids([r["caption"] for r in records]))
    clip = CLIPTextModel.from_pretrained(MODEL_FOLDER / "text_encoder", dtype=torch.float32).eval()
    t5 = T5EncoderModel.from_pretrained(MODEL_FOLDER / "text_encoder_2", dtype=torch.float32).eval()
    pooled = torch.cat([clip(ids).pooler_output for ids in clip_ids.split(256)])
    text = torch.cat([t5(ids)[0] for ids in t5_ids.split(256)])
    latents = pack(torch.load(CACHE_FOLDER / "latents.pt", weights_only=True)["latents"]).float()
    return TrainingSet(latents[keep].clone(), text.clone(), pooled.clone())


def draw_sigma(count: int, config: FlowConfig, generator: torch.Generator) -> torch.Tensor:
    """(B,) in (0, 1)."""
    sigma = torch.sigmoid(config.sigma_mean + config.sigma_std * torch.randn(count, generator=generator))
    uniform = torch.rand(count, generator=generator)
    return torch.where(torch.rand(count, generator=generator) < config.uniform_share, uniform, sigma)


def position_ids() -> tuple[torch.Tensor, torch.Tensor]:
    """Image ids (M, 3): zero, row, column; text ids (S, 3): zeros. As FluxPipeline makes them."""
    image = torch.zeros(8, 8, 3)
    image[..., 1], image[..., 2] = torch.arange(8)[:, None], torch.arange(8)[None]
    return image.reshape(64, 3), torch.zeros(16, 3)


def flow_loss(transformer: FluxTransformer2DModel, chosen: TrainingSet, config: FlowConfig, generator: torch.Generator) -> torch.Tensor:
    """Mean squared error of the predicted velocity over one batch."""
    latent_BMC = chosen.latents_IMC
    noise_BMC = torch.randn(latent_BMC.shape, generator=generator)
    sigma_B = draw_sigma(len(latent_BMC), config, generator)
    image_ids, text_ids = position_ids()
    with torch.autocast("cpu", torch.bfloat16):
        velocity_BMC = transformer(
            hidden_states=torch.lerp(latent_BMC, noise_BMC, sigma_B[:, None, None]),
            encoder_hidden_states=chosen.text_ISD,
            pooled_projections=chosen.pooled_ID,
            timestep=sigma_B,
            img_ids=image_ids,
            txt_ids=text_ids,
            return_dict=False,
        )[0]
    return F.mse_loss(velocity_BMC.float(), noise_BMC - latent_BMC)


def make_optimizers(transformer: FluxTransformer2DModel, config: FlowConfig) -> list[torch.optim.Optimizer]:
    """Muon for attention and MLP matrices; Adam for embedders, modulation, norms, biases and the output."""
    matrices, others = [], []
    for name, weight in transformer.named_parameters():
        inner = weight.ndim == 2 and "transformer_blocks" in name and ".norm" not in name
        (matrices if inner else others).append(weight)
    return [
        Muon(matrices, lr=config.matrix_lr),
        torch.optim.AdamW(others, lr=config.other_lr, betas=(0.9, 0.98), weight_decay=0.0, foreach=True),
    ]


class Run:
    """Weights, their average, optimizers and counters: everything that a state file holds."""

    def __init__(self, config: FlowConfig, fresh: bool):
        torch.manual_seed(config.seed)
        self.config, self.step, self.samples = config, 0, 0
        self.transformer = make_transformer(TransformerSize())
        if not fresh and not STATE_FILE.exists():
            saved = FluxTransformer2DModel.from_pretrained(MODEL_FOLDER / "transformer", torch_dtype=torch.float32)
            self.transformer.load_state_dict(saved.state_dict())
        self.transformer.set_attn_processor(FastAttention())
        self.optimizers = make_optimizers(self.transformer, config)
        self.average = {k: v.clone() for k, v in self.transformer.state_dict().items()}
        if not fresh and STATE_FILE.exists():
            self._load(torch.load(STATE_FILE, weights_only=True))

    def _load(self, state: dict) -> None:
        self.transformer.load_state_dict(state["weights"])
        self.average, self.step, self.samples = state["average"], state["step"], state["samples"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def save(self) -> None:
        """Write the state file (cache only; the model folder is written by `export`)."""
        state = {"weights": self.transformer.state_dict(), "average": self.average, "step": self.step}
        save_state(STATE_FILE, state | {"samples": self.samples, "optimizers": [o.state_dict() for o in self.optimizers]})

    def export(self) -> None:
        """Averaged weights to the model folder, float16."""
        transformer = make_transformer(TransformerSize())
        transformer.load_state_dict(self.average)
        save_part("transformer", transformer)

    def update(self, loss: torch.Tensor, factor: float) -> None:
        """One optimizer step at `factor` of the peak rates, and the running average."""
        for optimizer, peak_lr in zip(self.optimizers, (self.config.matrix_lr, self.config.other_lr), strict=True):
            optimizer.param_groups[0]["lr"] = peak_lr * factor
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        self.samples += self.config.batch
        decay = min(self.config.ema, (1 + self.step) / (20 + self.step))
        torch._foreach_lerp_(list(self.average.values()), list(self.transformer.state_dict().values()), 1 - decay)


def train(run: Run, training: TrainingSet, minutes: float, decay_minutes: float) -> None:
    """Full rate, then linear decay over the last `decay_minutes`; a resumed run warms up again."""
    config, generator = run.config, torch.Generator().manual_seed(run.config.seed + run.step)
    start = last_save = time.time()
    first_step, losses, order = run.step, [], torch.empty(0, dtype=torch.long)
    while (left_s := start + minutes * 60 - time.time()) > 0:
        if len(order) < config.batch:
            order = torch.randperm(len(training.latents_IMC), generator=generator)
        rows, order = order[: config.batch], order[config.batch :]
        batch = TrainingSet(training.latents_IMC[rows], training.text_ISD[rows], training.pooled_ID[rows])
        loss = flow_loss(run.transformer, batch, config, generator)
        warmup = (run.step - first_step + 1) / config.warmup_steps
        run.update(loss, min(1.0, warmup, 0.01 + left_s / (60 * max(decay_minutes, 1e-3))))
        losses.append(loss.item())
        if run.step % 50 == 0:
            rate = (run.step - first_step) * config.batch / (time.time() - start)
            mean = sum(losses[-50:]) / len(losses[-50:])
            print(f"step {run.step}  loss {mean:.4f}  {run.samples} samples  {rate:.0f} images/s", flush=True)
        if time.time() - last_save > config.save_every_s:
            run.save()
            last_save = time.time()
    run.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--decay-minutes", type=float, default=20)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--export", action="store_true")
    options = parser.parse_args()
    prepare_process()
    run = Run(FlowConfig(), options.fresh)
    if not options.export:
        train(run, load_set(), options.minutes, options.decay_minutes)
    run.export()
    print(f"exported after {run.samples} samples")


if __name__ == "__main__":
    main()
