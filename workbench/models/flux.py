"""The Flux family (FluxPipeline, Black Forest Labs 2024): double blocks with separate text and image streams,
then single blocks on the joined sequence. Flow matching; the transformer receives sigma = t / 1000 as its time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from workbench.models.bundle import Bundle
from workbench.models.denoiser import Call, Denoiser
from workbench.models.discover import Rule
from workbench.models.flux_fast_forward import FastForward, join
from workbench.models.integrator import Integrator
from workbench.models.media import Media
from workbench.types import Conditioning

GUIDANCE = 3.5  # what FluxPipeline uses by default; read only by guidance-distilled models


class FluxDenoiser(Denoiser):
    """One call a step."""

    def __init__(self, bundle: FluxBundle, integrator: Integrator):
        self._bundle, self._integrator = bundle, integrator

    def calls(self, x: Tensor, step: int, conditioning: Conditioning) -> tuple[Call, ...]:
        dtype = self._bundle.dtype
        timestep = self._integrator.time_T[step].to(x.device).expand(len(x)).to(dtype) / 1000
        condition = {name: value.to(dtype) for name, value in conditioning.per_sample.items()}
        return (Call(inputs={"hidden_states": x.to(dtype), "timestep": timestep, **condition, **conditioning.shared,
                             "return_dict": False}),)

    def combine(self, outputs: Sequence[Tensor], step: int) -> Tensor:
        [output] = outputs
        return output if output.dtype == torch.float64 else output.float()

    def fast(self, modules: Mapping[str, nn.Module], conditioning: Conditioning) -> Callable[[Tensor, int], Tensor] | None:
        if modules["transformer"].is_cache_enabled:  # diffusers' caches hook into its own forward
            return None
        fast_forward = FastForward(modules["transformer"], conditioning, self._integrator.steps,
                                   lambda steps: self._bundle.modulation_input(self._integrator, steps, conditioning))
        return lambda x, step: self.combine([fast_forward.output(x.to(self._bundle.dtype), step)], step)


class FluxBundle(Bundle):
    """A FluxPipeline. Image size and text length come from the VAE's `sample_size` and the T5 tokenizer's limit."""

    blocks: ClassVar = {"transformer_blocks": "double", "single_transformer_blocks": "single"}
    rules: ClassVar = (
        Rule(r"transformer_blocks\.\d+\.norm\w*\.linear", "modulation"),
        Rule(r"single_transformer_blocks\.\d+\.norm\.linear", "modulation"),
        Rule(r"transformer_blocks\.\d+\.attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)", "quantize"),
        Rule(r"transformer_blocks\.\d+\.ff(_context)?\.net\.(0\.proj|2)", "quantize"),
        Rule(r"single_transformer_blocks\.\d+\.(proj_mlp|proj_out|attn\.to_[qkv])", "quantize"),
        Rule(r"x_embedder", "float", "input projection"),
        Rule(r"context_embedder", "float", "text projection"),
        Rule(r"time_text_embed\..+", "float", "time and text embedder"),
        Rule(r"norm_out\.linear", "float", "final modulation"),
        Rule(r"proj_out", "float", "output projection"),
    )

    def __init__(self, **kwargs):
        pipeline = kwargs["pipeline"]
        self.size = int(pipeline.vae.config.sample_size)
        self.text_tokens = min(int(pipeline.tokenizer_2.model_max_length), 512)
        self.image_tokens = (self.size // pipeline.vae_scale_factor // 2) ** 2
        super().__init__(**kwargs)

    def prepare(self) -> None:
        super().prepare()
        join(self.transformer)

    def integrator(self, steps: int) -> Integrator:
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        config = self.pipeline.scheduler.config
        mu = calculate_shift(self.image_tokens, config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096),
                             config.get("base_shift", 0.5), config.get("max_shift", 1.15))
        if config.get("use_flow_sigmas", False):
            return Integrator.of(self.pipeline.scheduler, steps, mu=mu)
        return Integrator.of(self.pipeline.scheduler, steps, sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)

    def denoiser(self, integrator: Integrator) -> FluxDenoiser:
        return FluxDenoiser(self, integrator)

    def sigma_of(self, kwargs: Mapping) -> Tensor:
        return kwargs["timestep"]

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        embeds, pooled, text_ids = self.pipeline.encode_prompt(
            prompt=list(prompts), prompt_2=None, device=self.device, max_sequence_length=self.text_tokens)
        return self._conditioning(embeds, pooled, text_ids)

    def _conditioning(self, embeds: Tensor, pooled: Tensor, text_ids: Tensor) -> Conditioning:
        device, per_sample = embeds.device, {"encoder_hidden_states": embeds, "pooled_projections": pooled}
        if self.transformer.config.guidance_embeds:
            per_sample["guidance"] = torch.full([len(embeds)], GUIDANCE, device=device)
        side = self.size // self.pipeline.vae_scale_factor // 2
        image_ids = self.pipeline._prepare_latent_image_ids(1, side, side, device, embeds.dtype)
        return Conditioning(per_sample=per_sample, shared={"txt_ids": text_ids, "img_ids": image_ids})

    def example(self, device: torch.device) -> tuple[Tensor, Conditioning]:
        config = self.transformer.config
        latent = torch.zeros(1, self.image_tokens, config.in_channels, device=device)
        return latent, self._conditioning(torch.zeros(1, self.text_tokens, config.joint_attention_dim, device=device),
                                          torch.zeros(1, config.pooled_projection_dim, device=device),
                                          torch.zeros(self.text_tokens, 3, device=device))

    def noise(self, seeds: Sequence[int]) -> Tensor:
        channels = self.transformer.config.in_channels // 4
        rows = [self.pipeline.prepare_latents(1, channels, self.size, self.size, torch.float32, self.device,
                                              torch.Generator("cpu").manual_seed(seed))[0] for seed in seeds]
        return torch.cat(rows)

    @torch.no_grad()
    def modulation_input(self, integrator: Integrator, steps: range, conditioning: Conditioning) -> Tensor:
        """Depends on the time, the pooled prompt and the guidance: cached per prompt and schedule."""
        pooled_SP = conditioning.per_sample["pooled_projections"].to(self.dtype)
        samples = len(pooled_SP)
        timestep = integrator.time_T[steps.start:steps.stop].to(pooled_SP.device, self.dtype).repeat_interleave(samples)
        embedded = [timestep / 1000 * 1000]  # as the transformer does
        if "guidance" in conditioning.per_sample:
            embedded.append(conditioning.per_sample["guidance"].to(self.dtype).repeat(len(steps)) * 1000)
        made = self.transformer.time_text_embed(*embedded, pooled_SP.repeat(len(steps), 1))
        return torch.nn.functional.silu(made).unflatten(0, (len(steps), samples))

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Media:
        vae = self.pipeline.vae
        latent = self.pipeline._unpack_latents(latent.to(self.device), self.size, self.size, self.pipeline.vae_scale_factor)
        latent = latent / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        # One at a time: memory stays bounded and an image never depends on its neighbours in the batch.
        images = [vae.decode(one[None].to(vae.dtype), return_dict=False)[0].float() for one in latent]
        images = [self.pipeline.image_processor.postprocess(image, output_type="np") for image in images]
        return Media.of_images((np.concatenate(images) * 255).round().astype(np.uint8))
