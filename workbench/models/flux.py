"""The Flux family (FluxPipeline, Black Forest Labs 2024): double blocks with separate text and image streams,
then single blocks on the joined sequence. Flow matching; the transformer receives sigma = t / 1000 as its time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
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
from workbench.options import BadInput, GenerationConfig
from workbench.types import Conditioning

GUIDANCE = 3.5  # what FluxPipeline uses by default; read only by guidance-distilled models
TEXT_TOKENS, TEXT_TOKENS_SCHNELL = 512, 256  # of the models with guidance embedded, and of those without
NEGATIVE = "negative_"  # before the names of what a negative prompt became


class FluxDenoiser(Denoiser):
    """One call a step; two where a negative prompt guides."""

    def __init__(self, bundle: FluxBundle, integrator: Integrator):
        self._bundle, self._integrator = bundle, integrator

    def calls(self, x: Tensor, step: int, conditioning: Conditioning) -> tuple[Call, ...]:
        dtype = self._bundle.dtype
        timestep = self._integrator.time_T[step].to(x.device).expand(len(x)).to(dtype) / 1000
        return tuple(Call(branch=branch, inputs={
            "hidden_states": x.to(dtype), "timestep": timestep,
            **{name: value.to(dtype) for name, value in each.per_sample.items()}, **each.shared, "return_dict": False})
            for branch, each in self._branches(conditioning))

    def combine(self, outputs: Sequence[Tensor], step: int) -> Tensor:
        outputs = [output if output.dtype == torch.float64 else output.float() for output in outputs]
        if len(outputs) == 1:
            return outputs[0]
        cond, uncond = outputs
        return uncond + self._bundle.true_guidance * (cond - uncond)

    def _branches(self, conditioning: Conditioning) -> tuple[tuple[str, Conditioning], ...]:
        """By branch, what the transformer is given."""
        values = conditioning.per_sample
        cond = replace(conditioning, per_sample={name: value for name, value in values.items() if not name.startswith(NEGATIVE)})
        if self._bundle.true_guidance is None:
            return (("cond", cond),)
        negative = {name.removeprefix(NEGATIVE): value for name, value in values.items() if name.startswith(NEGATIVE)}
        return ("cond", cond), ("uncond", replace(cond, per_sample={**cond.per_sample, **negative}))

    def fast(self, modules: Mapping[str, nn.Module], conditioning: Conditioning) -> Callable[[Tensor, int], Tensor] | None:
        if modules["transformer"].is_cache_enabled:  # diffusers' caches hook into its own forward
            return None
        branches = [FastForward(modules["transformer"], each, self._integrator.steps,
                                lambda steps, each=each: self._bundle.modulation_input(self._integrator, steps, each))
                    for _, each in self._branches(conditioning)]
        return lambda x, step: self.combine([branch.output(x.to(self._bundle.dtype), step) for branch in branches], step)


class FluxBundle(Bundle):
    """A FluxPipeline: dev (guidance embedded) or schnell. Unless asked for, the size is the VAE's `sample_size`, and the text length that
    of the model or the T5 tokenizer's limit."""

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

    @property
    def takes(self) -> tuple[str, ...]:
        embedded = ("guidance",) if self.transformer.config.guidance_embeds else ()
        return ("height", "width", *embedded, "true_guidance", "text_tokens", "negative_prompt")

    def settle(self, asked: GenerationConfig) -> None:
        embedded, patch = self.transformer.config.guidance_embeds, 2 * self.pipeline.vae_scale_factor
        if bool(asked.negative_prompt) != (asked.true_guidance is not None):
            raise BadInput("true guidance and a negative prompt need each other; give both or none")
        size = int(self.pipeline.vae.config.sample_size)
        self.height, self.width = asked.height or size, asked.width or size
        for side in (self.height, self.width):
            if side % patch:
                raise BadInput(f"{side} pixels: height and width must be divisible by {patch}")
        most = min(int(self.pipeline.tokenizer_2.model_max_length), TEXT_TOKENS)
        if (asked.text_tokens or 0) > most:
            raise BadInput(f"{asked.text_tokens} text tokens; this model reads at most {most}")
        self.text_tokens = asked.text_tokens or (most if embedded else min(most, TEXT_TOKENS_SCHNELL))
        self.guidance = GUIDANCE if asked.guidance is None else asked.guidance
        self.true_guidance = asked.true_guidance
        self.rows, self.columns = self.height // patch, self.width // patch
        self.image_tokens = self.rows * self.columns

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
        embeds, pooled, text_ids = self._embed(prompts)
        found = self._conditioning(embeds, pooled, text_ids)
        if self.true_guidance is not None:
            embeds, pooled, _ = self._embed([self.generation.negative_prompt] * len(prompts))
            found.per_sample.update({f"{NEGATIVE}encoder_hidden_states": embeds, f"{NEGATIVE}pooled_projections": pooled})
        return found

    def _embed(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        return self.pipeline.encode_prompt(prompt=list(prompts), prompt_2=None, device=self.device, max_sequence_length=self.text_tokens)

    def _conditioning(self, embeds: Tensor, pooled: Tensor, text_ids: Tensor) -> Conditioning:
        device, per_sample = embeds.device, {"encoder_hidden_states": embeds, "pooled_projections": pooled}
        if self.transformer.config.guidance_embeds:
            per_sample["guidance"] = torch.full([len(embeds)], self.guidance, device=device)
        image_ids = self.pipeline._prepare_latent_image_ids(1, self.rows, self.columns, device, embeds.dtype)
        return Conditioning(per_sample=per_sample, shared={"txt_ids": text_ids, "img_ids": image_ids})

    def example(self, device: torch.device) -> tuple[Tensor, Conditioning]:
        config = self.transformer.config
        latent = torch.zeros(1, self.image_tokens, config.in_channels, device=device)
        embeds = torch.zeros(1, self.text_tokens, config.joint_attention_dim, device=device)
        pooled = torch.zeros(1, config.pooled_projection_dim, device=device)
        found = self._conditioning(embeds, pooled, torch.zeros(self.text_tokens, 3, device=device))
        if self.true_guidance is not None:
            found.per_sample.update({f"{NEGATIVE}encoder_hidden_states": embeds, f"{NEGATIVE}pooled_projections": pooled})
        return latent, found

    def noise(self, seeds: Sequence[int]) -> Tensor:
        channels = self.transformer.config.in_channels // 4
        rows = [self.pipeline.prepare_latents(1, channels, self.height, self.width, torch.float32, self.device,
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
        latent = self.pipeline._unpack_latents(latent.to(self.device), self.height, self.width, self.pipeline.vae_scale_factor)
        latent = latent / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        # One at a time: memory stays bounded and an image never depends on its neighbours in the batch.
        images = [vae.decode(one[None].to(vae.dtype), return_dict=False)[0].float() for one in latent]
        images = [self.pipeline.image_processor.postprocess(image, output_type="np") for image in images]
        return Media.of_images((np.concatenate(images) * 255).round().astype(np.uint8))
