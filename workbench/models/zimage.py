"""The Z-Image family (ZImagePipeline, Z-Image and Z-Image-Turbo, arXiv 2511.22699): image and text go through refiners of their own, then
as one sequence through one stack. Flow matching; the transformer is told 1 - sigma as (1000 - t) / 1000, and what it returns is negated.

Texts differ in length. Each sequence is filled up to a multiple of 32 with learned tokens, which are attended to, and in a batch to the
longest with masked ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from workbench.models.bundle import Bundle
from workbench.models.denoiser import Call, Denoiser
from workbench.models.discover import Rule
from workbench.models.integrator import Integrator
from workbench.models.media import Media
from workbench.options import BadInput, GenerationConfig
from workbench.types import Conditioning

GUIDANCE, SIDE, TEXT_TOKENS = 5.0, 1024, 512  # what ZImagePipeline uses by default; Turbo is meant to be used with guidance 0
TEXT, NEGATIVE_TEXT = "cap_feats", "negative_cap_feats"


class ZImageDenoiser(Denoiser):
    """One call a step; with guidance it holds every sample twice, all with their prompts before all with the negative one."""

    def __init__(self, bundle: ZImageBundle, integrator: Integrator):
        self._bundle, self._integrator = bundle, integrator

    def calls(self, x: Tensor, step: int, conditioning: Conditioning) -> tuple[Call, ...]:
        rows, dtype = self._bundle.rows, self._bundle.dtype
        time = told(self._integrator.time_T[step].to(x.device)).expand(rows * len(x))
        texts = conditioning.per_sample[TEXT] + conditioning.per_sample.get(NEGATIVE_TEXT, ())
        return (Call(branch="cond" if rows == 1 else "batched", rows=rows, inputs={
            "x": x.to(dtype).repeat(rows, 1, 1, 1).unsqueeze(2).unbind(), "t": time,
            "cap_feats": tuple(text.to(dtype) for text in texts), "return_dict": False}),)

    def output_of(self, returned) -> Tensor:
        return torch.stack(returned[0]).squeeze(2)

    def combine(self, outputs: Sequence[Tensor], step: int) -> Tensor:
        [output] = outputs
        output = output if output.dtype == torch.float64 else output.float()
        if self._bundle.rows == 1:
            return -output
        cond, uncond = output.chunk(2)
        return -(cond + self._bundle.guidance * (cond - uncond))


def told(time: Tensor) -> Tensor:
    """What the transformer is told of a scheduler's time."""
    return (1000 - time) / 1000


class ZImageBundle(Bundle):
    """A ZImagePipeline. A guidance w above 0 is on and adds w times the difference to the prompt's own output; 1 is not off."""

    blocks: ClassVar = {"noise_refiner": "noise_refiner", "context_refiner": "context_refiner", "layers": "layer"}
    rules: ClassVar = (
        Rule(r"(noise_refiner|layers)\.\d+\.adaLN_modulation\.0", "modulation"),
        Rule(r"(noise_refiner|context_refiner|layers)\.\d+\.attention\.(to_[qkv]|to_out\.0)", "quantize"),
        Rule(r"(noise_refiner|context_refiner|layers)\.\d+\.feed_forward\.w[123]", "quantize"),
        Rule(r"all_x_embedder\..+", "float", "input projection"),
        Rule(r"cap_embedder\.1", "float", "text projection"),
        Rule(r"t_embedder\..+", "float", "time embedder"),
        Rule(r"all_final_layer\..+\.adaLN_modulation\.1", "float", "final modulation"),
        Rule(r"all_final_layer\..+\.linear", "float", "output projection"),
    )

    takes: ClassVar = ("height", "width", "guidance", "text_tokens", "negative_prompt")

    def settle(self, asked: GenerationConfig) -> None:
        from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF

        patch, (text_positions, *image_positions) = 2 * self.pipeline.vae_scale_factor, self.transformer.config.axes_lens
        most_height, most_width = (patch * positions for positions in image_positions)
        self.height, self.width = asked.height or min(SIDE, most_height), asked.width or min(SIDE, most_width)
        if self.height % patch or self.width % patch:
            raise BadInput(f"{self.height} x {self.width} pixels: height and width must be divisible by {patch}")
        if self.height > most_height or self.width > most_width:
            raise BadInput(f"{self.height} x {self.width} pixels; this model draws at most {most_height} x {most_width}")
        # a text, filled up, stands at 1, 2, ... of the first axis, and the image after it
        most = min((text_positions - 2) // SEQ_MULTI_OF * SEQ_MULTI_OF, int(self.pipeline.tokenizer.model_max_length))
        if (asked.text_tokens or 0) > most:
            raise BadInput(f"{asked.text_tokens} text tokens; this model reads at most {most}")
        self.text_tokens = asked.text_tokens or min(TEXT_TOKENS, most)
        self.guidance = GUIDANCE if asked.guidance is None else asked.guidance
        if asked.negative_prompt and self.guidance == 0:
            raise BadInput("a negative prompt does nothing at guidance 0; give a guidance above it, or no negative prompt")
        self.rows = 2 if self.guidance > 0 else 1
        self.image_tokens = (self.height // patch) * (self.width // patch)

    def integrator(self, steps: int) -> Integrator:
        from diffusers.pipelines.z_image.pipeline_z_image import calculate_shift, get_default_z_image_sigmas

        config = self.pipeline.scheduler.config
        mu = calculate_shift(self.image_tokens, config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096),
                             config.get("base_shift", 0.5), config.get("max_shift", 1.15))
        return Integrator.of(self.pipeline.scheduler, steps, sigmas=get_default_z_image_sigmas(steps), mu=mu)

    def denoiser(self, integrator: Integrator) -> ZImageDenoiser:
        return ZImageDenoiser(self, integrator)

    def sigma_of(self, kwargs: Mapping) -> Tensor:
        return 1 - kwargs["t"]

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        # lists of its own: the pipeline writes its chat template into what it is given
        texts, negative_texts = self.pipeline.encode_prompt(
            prompt=list(prompts), device=self.device, do_classifier_free_guidance=self.rows == 2,
            negative_prompt=[self.generation.negative_prompt] * len(prompts), max_sequence_length=self.text_tokens)
        return self._conditioning(texts, negative_texts)

    def _conditioning(self, texts: Sequence[Tensor], negative_texts: Sequence[Tensor]) -> Conditioning:
        """Texts (tokens, K) by sample."""
        negative = {NEGATIVE_TEXT: tuple(negative_texts)} if self.rows == 2 else {}
        return Conditioning(per_sample={TEXT: tuple(texts), **negative}, shared={})

    def example(self, device: torch.device) -> tuple[Tensor, Conditioning]:
        scale, config = self.pipeline.vae_scale_factor, self.transformer.config
        latent = torch.zeros(1, config.in_channels, self.height // scale, self.width // scale, device=device)
        longest = [torch.zeros(self.text_tokens, config.cap_feat_dim, device=device)]
        return latent, self._conditioning(longest, longest)

    def noise(self, seeds: Sequence[int]) -> Tensor:
        return torch.cat([self.pipeline.prepare_latents(1, self.transformer.config.in_channels, self.height, self.width, torch.float32,
                                                        self.device, torch.Generator("cpu").manual_seed(seed)) for seed in seeds])

    @torch.no_grad()
    def modulation_input(self, integrator: Integrator, steps: range, conditioning: Conditioning) -> Tensor:
        """Depends on the time alone; (T, S, K), with guidance (T, 2 S, K), as a call has it."""
        rows = self.rows * len(conditioning.per_sample[TEXT])
        time = told(integrator.time_T[steps.start:steps.stop].to(self.device)).repeat_interleave(rows)
        return self.transformer.t_embedder(time * self.transformer.t_scale).to(self.dtype).unflatten(0, (len(steps), rows))

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Media:
        vae = self.pipeline.vae
        latent = latent.to(self.device, vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        # One at a time: memory stays bounded and an image never depends on its neighbours in the batch.
        images = [vae.decode(one[None], return_dict=False)[0].float() for one in latent]
        images = [self.pipeline.image_processor.postprocess(image, output_type="np") for image in images]
        return Media.of_images((np.concatenate(images) * 255).round().astype(np.uint8))
