"""The Flux family (FluxPipeline, Black Forest Labs 2024): double blocks with separate text and image streams,
then single blocks on the joined sequence. Flow matching; the transformer receives sigma = t / 1000 as its time."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from workbench.models.bundle import Bundle
from workbench.models.flux_lean import LeanFlux
from workbench.types import Conditioning, LayerInfo, Schedule

GUIDANCE = 3.5  # what FluxPipeline uses by default; read only by guidance-distilled models

# role -> (stream, role whose input it shares); the order of execution inside a block
DOUBLE_ROLES = {
    "attn.to_q": ("image", "attn.to_q"), "attn.to_k": ("image", "attn.to_q"), "attn.to_v": ("image", "attn.to_q"),
    "attn.add_q_proj": ("text", "attn.add_q_proj"), "attn.add_k_proj": ("text", "attn.add_q_proj"),
    "attn.add_v_proj": ("text", "attn.add_q_proj"),
    "attn.to_out.0": ("image", "attn.to_out.0"), "attn.to_add_out": ("text", "attn.to_add_out"),
    "ff.net.0.proj": ("image", "ff.net.0.proj"), "ff.net.2": ("image", "ff.net.2"),
    "ff_context.net.0.proj": ("text", "ff_context.net.0.proj"), "ff_context.net.2": ("text", "ff_context.net.2"),
}
SINGLE_ROLES = {
    "proj_mlp": ("both", "proj_mlp"), "attn.to_q": ("both", "proj_mlp"), "attn.to_k": ("both", "proj_mlp"),
    "attn.to_v": ("both", "proj_mlp"), "proj_out": ("both", "proj_out"),
}
PROTECTED = {
    "x_embedder": "input projection", "context_embedder": "text projection", "time_text_embed": "time and text embedder",
    "norm_out": "final modulation", "proj_out": "output projection",
}
_BLOCK = re.compile(r"(transformer_blocks|single_transformer_blocks)\.(\d+)\.(.+)")


class FluxBundle(Bundle):
    """A FluxPipeline. Image size and text length come from the VAE's `sample_size` and the T5 tokenizer's limit."""

    def __init__(self, **kwargs):
        pipeline = kwargs["pipeline"]
        self.size = int(pipeline.vae.config.sample_size)
        self.text_tokens = min(int(pipeline.tokenizer_2.model_max_length), 512)
        self.image_tokens = (self.size // pipeline.vae_scale_factor // 2) ** 2
        super().__init__(**kwargs)
        self.check_layers()
        self._lean = LeanFlux()

    def _sort_linears(self):
        tokens = {"image": self.image_tokens, "text": self.text_tokens, "both": self.image_tokens + self.text_tokens}
        layers: list[LayerInfo] = []
        for stack, label, roles in (("transformer_blocks", "double", DOUBLE_ROLES), ("single_transformer_blocks", "single", SINGLE_ROLES)):
            for number in range(len(getattr(self.transformer, stack))):
                first = {role: len(layers) + position for position, role in enumerate(roles)}
                for role, (stream, shared) in roles.items():
                    layers.append(self._describe(f"{stack}.{number}.{role}", f"{label}.{number}", role, tokens[stream],
                                                 index=len(layers), shared=first[shared]))
        known = {layer.name for layer in layers}
        modulation, protected = [], {}
        for name, module in self.transformer.named_modules():
            if not isinstance(module, torch.nn.Linear) or name in known:
                continue
            match = _BLOCK.fullmatch(name)
            if match and match[3].startswith("norm") and match[3].endswith("linear"):
                label = "double" if match[1] == "transformer_blocks" else "single"
                modulation.append(self._describe(name, f"{label}.{match[2]}", match[3], 1, index=len(modulation), shared=len(modulation)))
            elif name.split(".")[0] in PROTECTED:
                protected[name] = PROTECTED[name.split(".")[0]]
        return tuple(layers), tuple(modulation), protected

    def _describe(self, name: str, block: str, role: str, tokens: int, *, index: int, shared: int) -> LayerInfo:
        linear = self.transformer.get_submodule(name)
        return LayerInfo(index=index, name=name, block=block, role=role, n_out=linear.out_features, k_in=linear.in_features,
                         tokens=tokens, has_bias=linear.bias is not None, shares_input_with=shared)

    def _sigma_of(self, kwargs: dict) -> float:
        return float(kwargs["timestep"].flatten()[0])

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        embeds, pooled, text_ids = self.pipeline.encode_prompt(
            prompt=list(prompts), prompt_2=None, device=self.device, max_sequence_length=self.text_tokens)
        per_sample = {"encoder_hidden_states": embeds, "pooled_projections": pooled}
        if self.transformer.config.guidance_embeds:
            per_sample["guidance"] = torch.full([len(embeds)], GUIDANCE, device=self.device)
        side = self.size // self.pipeline.vae_scale_factor // 2
        image_ids = self.pipeline._prepare_latent_image_ids(1, side, side, self.device, embeds.dtype)
        return Conditioning(per_sample=per_sample, shared={"txt_ids": text_ids, "img_ids": image_ids})

    def initial_latents(self, seeds: Sequence[int]) -> Tensor:
        channels = self.transformer.config.in_channels // 4
        rows = [self.pipeline.prepare_latents(1, channels, self.size, self.size, torch.float32, self.device,
                                              torch.Generator("cpu").manual_seed(seed))[0] for seed in seeds]
        return torch.cat(rows)

    def schedule(self, steps: int) -> Schedule:
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

        scheduler = copy.deepcopy(self.pipeline.scheduler)
        config = scheduler.config
        mu = calculate_shift(self.image_tokens, config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096),
                             config.get("base_shift", 0.5), config.get("max_shift", 1.15))
        sigmas = None if config.get("use_flow_sigmas", False) else np.linspace(1.0, 1 / steps, steps)
        timesteps, _ = retrieve_timesteps(scheduler, steps, "cpu", sigmas=sigmas, mu=mu)
        return Schedule(sigma_T1=scheduler.sigmas.float().cpu(), timestep_T=timesteps.float().cpu())

    def velocity(self, latent_SMD: Tensor, schedule: Schedule, step: int, conditioning: Conditioning) -> Tensor:
        latent_SMD = latent_SMD.to(self.dtype)
        if torch.is_grad_enabled() or self.transformer.is_cache_enabled:
            timestep = schedule.timestep_T[step].to(self.device).expand(len(latent_SMD)).to(self.dtype) / 1000
            condition = {key: value.to(self.dtype) for key, value in conditioning.per_sample.items()}
            output = self.transformer(hidden_states=latent_SMD, timestep=timestep, **condition, **conditioning.shared, return_dict=False)[0]
        else:
            self.cursor.move_to(float(schedule.timestep_T[step]) / 1000)
            output = self._lean.velocity(self.transformer, latent_SMD, schedule, step, conditioning,
                                         lambda steps: self.modulation_input(schedule, steps, conditioning))
        return output if output.dtype == torch.float64 else output.float()

    @torch.no_grad()
    def modulation_input(self, schedule: Schedule, steps: range, conditioning: Conditioning) -> Tensor:
        """Depends on the time, the pooled prompt and the guidance: cached per prompt and schedule."""
        pooled_SP = conditioning.per_sample["pooled_projections"].to(self.dtype)
        samples = len(pooled_SP)
        timestep = schedule.timestep_T[steps.start:steps.stop].to(self.device, self.dtype).repeat_interleave(samples)
        embedded = [timestep / 1000 * 1000]  # as the transformer does
        if "guidance" in conditioning.per_sample:
            embedded.append(conditioning.per_sample["guidance"].to(self.dtype).repeat(len(steps)) * 1000)
        made = self.transformer.time_text_embed(*embedded, pooled_SP.repeat(len(steps), 1))
        return torch.nn.functional.silu(made).unflatten(0, (len(steps), samples))

    @torch.no_grad()
    def decode(self, latent_SMD: Tensor) -> np.ndarray:
        vae = self.pipeline.vae
        latent = self.pipeline._unpack_latents(latent_SMD.to(self.device), self.size, self.size, self.pipeline.vae_scale_factor)
        latent = latent / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        # One at a time: memory stays bounded and an image never depends on its neighbours in the batch.
        images = [vae.decode(one[None].to(vae.dtype), return_dict=False)[0].float() for one in latent]
        images = [self.pipeline.image_processor.postprocess(image, output_type="np") for image in images]
        return (np.concatenate(images) * 255).round().astype(np.uint8)
