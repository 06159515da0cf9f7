"""Train the autoencoder of emoji-flux and cache every image's latents.

`python assets/build/train_vae.py --minutes 12` trains (or goes on from its state file) under a fixed time budget, then
writes `vae/` into the model folder and `latents.pt` into the cache folder. `--minutes 0` only encodes, with the saved one.

Letters: B batch, C latent channels (16), H = W = 16 latent pixels.
"""

import argparse
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from common import CACHE_FOLDER, MODEL_FOLDER, prepare_process, save_state
from diffusers import AutoencoderKL
from model import save_part
from muon import Muon

STATE_FILE = CACHE_FOLDER / "vae_state.pt"


@dataclass(frozen=True, kw_only=True)
class VaeConfig:
    """Latents get noise of a fixed standard deviation instead of a learned one: a learned one starts large and halves the speed."""

    channels: tuple[int, ...] = (16, 32, 64, 96)
    batch: int = 8
    kernel_lr: float = 0.02
    other_lr: float = 2e-3
    warmup_steps: int = 30
    latent_noise: float = 0.05
    latent_weight: float = 1e-4
    l1_weight: float = 0.1
    log_variance: float = -6.0
    ema: float = 0.98
    seed: int = 0


def make_vae(config: VaeConfig) -> AutoencoderKL:
    """f8, 16 latent channels, no attention: one resnet per level down, two up."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=config.channels,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=128,
        scaling_factor=1.0,
        shift_factor=0.0,
        force_upcast=False,
    )
    for name, weight in vae.named_parameters():
        if name.endswith("conv2.weight"):  # residual branches start at zero
            torch.nn.init.zeros_(weight)
    torch.nn.init.zeros_(vae.encoder.conv_out.weight[16:])
    torch.nn.init.constant_(vae.encoder.conv_out.bias[16:], config.log_variance)
    return vae


def to_model_range(image: np.ndarray) -> torch.Tensor:
    """uint8 (B, 128, 128, 3) -> float (B, 3, 128, 128) in [-1, 1], channels last."""
    return (torch.from_numpy(image).permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def loss_of(vae: AutoencoderKL, image_B: torch.Tensor, config: VaeConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Training loss and mean squared error, both scalars, for images in [-1, 1]."""
    with torch.autocast("cpu", torch.bfloat16):
        latent_BCHW = vae.encode(image_B).latent_dist.mean
        noisy_BCHW = latent_BCHW + config.latent_noise * torch.randn_like(latent_BCHW)
        out_B = vae.decode(noisy_BCHW).sample.float()
    mse = F.mse_loss(out_B, image_B)
    loss = mse + config.l1_weight * F.l1_loss(out_B, image_B)
    return loss + config.latent_weight * latent_BCHW.float().square().mean(), mse.detach()


def make_optimizers(vae: AutoencoderKL, config: VaeConfig) -> list[torch.optim.Optimizer]:
    """Muon for the kernels, Adam for biases and norms."""
    kernels = [p for p in vae.parameters() if p.ndim == 4]
    others = [p for p in vae.parameters() if p.ndim != 4]
    return [
        Muon(kernels, lr=config.kernel_lr, momentum=0.9),
        torch.optim.AdamW(others, lr=config.other_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def starting_point(config: VaeConfig) -> tuple[AutoencoderKL, dict]:
    """The autoencoder to train and its averaged weights: from the state file, else fresh."""
    torch.manual_seed(config.seed)
    vae = make_vae(config).to(memory_format=torch.channels_last).train()
    if STATE_FILE.exists():
        state = torch.load(STATE_FILE, weights_only=True)
        vae.load_state_dict(state["vae"])
        return vae, state["averaged"]
    return vae, {k: v.clone() for k, v in vae.state_dict().items()}


def train(images: np.ndarray, config: VaeConfig, minutes: float) -> AutoencoderKL:
    """Full rate for half of the time budget, then linear decay; returns the averaged weights."""
    vae, averaged = starting_point(config)
    optimizers = make_optimizers(vae, config)
    rng = np.random.default_rng(config.seed + int(STATE_FILE.exists()))
    start, step, order, recent = time.time(), 0, np.empty(0, int), []
    while (progress := (time.time() - start) / (minutes * 60)) < 1:
        if len(order) < config.batch:
            order = rng.permutation(len(images))
        batch, order = np.sort(order[: config.batch]), order[config.batch :]
        factor = min(1.0, (step + 1) / config.warmup_steps, 0.01 + 2 * (1 - progress))
        loss, mse = loss_of(vae, to_model_range(images[batch]), config)
        for optimizer, peak_lr in zip(optimizers, (config.kernel_lr, config.other_lr), strict=True):
            optimizer.param_groups[0]["lr"] = peak_lr * factor
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        decay = min(config.ema, step / (step + 20))
        torch._foreach_lerp_(list(averaged.values()), list(vae.state_dict().values()), 1 - decay)
        recent.append(float(mse))
        if step % 25 == 0:
            psnr, rate = -10 * np.log10(np.mean(recent[-25:]) / 4), step * config.batch / (time.time() - start)
            print(f"step {step}  psnr {psnr:.2f} dB  rate {factor:.2f}  {rate:.0f} images/s", flush=True)
        if step % 200 == 0:
            save_state(STATE_FILE, {"vae": vae.state_dict(), "averaged": averaged})
    save_state(STATE_FILE, {"vae": vae.state_dict(), "averaged": averaged})
    vae.load_state_dict(averaged)
    return vae.eval()


@torch.inference_mode()
def encode_all(vae: AutoencoderKL, images: np.ndarray) -> torch.Tensor:
    """Posterior means (images, C, H, W), float32."""
    latents = []
    with torch.autocast("cpu", torch.bfloat16):
        for first in range(0, len(images), 32):
            latents.append(vae.encode(to_model_range(images[first : first + 32])).latent_dist.mean.float())
    return torch.cat(latents)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=12)
    minutes = parser.parse_args().minutes
    prepare_process()
    images = np.load(CACHE_FOLDER / "images.npy")
    if minutes > 0:
        vae = train(images, VaeConfig(), minutes)
        latents = encode_all(vae, images)
        vae.register_to_config(scaling_factor=1 / float(latents.std()), shift_factor=float(latents.mean()))
        save_part("vae", vae)
    else:
        vae = AutoencoderKL.from_pretrained(MODEL_FOLDER / "vae", torch_dtype=torch.float32, local_files_only=True)
        latents = encode_all(vae.to(memory_format=torch.channels_last).eval(), images)
    shift, scale = vae.config.shift_factor, vae.config.scaling_factor
    save_state(CACHE_FOLDER / "latents.pt", {"latents": (latents - shift) * scale})
    print(f"{len(images)} images encoded  shift {shift:.4f}  scale {scale:.4f}")


if __name__ == "__main__":
    main()
