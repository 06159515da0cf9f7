"""A toy family for the quantization tests: a residual network with the parts of a transformer, in a real Bundle."""

from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from workbench.models import Bundle
from workbench.models.denoiser import Call, Denoiser, denoise
from workbench.models.discover import Rule
from workbench.models.integrator import Integrator
from workbench.models.media import Media
from workbench.plans import BitChoice, CostTable, make_plan, usual_bits
from workbench.quant.bank import Calibration, solve_bank
from workbench.quant.grids import predicted_bytes
from workbench.replay.trace import trajectories
from workbench.types import Conditioning

WIDTH, HIDDEN, TOKENS = 64, 160, 6
ROLES = {"q": ("q", WIDTH, WIDTH), "k": ("q", WIDTH, WIDTH), "v": ("q", WIDTH, WIDTH), "out": ("out", WIDTH, WIDTH),
         "up": ("up", HIDDEN, WIDTH), "down": ("down", WIDTH, HIDDEN)}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        for role, (_, n_out, k_in) in ROLES.items():
            self.add_module(role, nn.Linear(k_in, n_out, bias=role != "out"))
        self.modulation = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x, time_SK):
        scale, shift = self.modulation(time_SK)[:, None].chunk(2, -1)
        h = nn.functional.layer_norm(x, (WIDTH,)) * (1 + scale) + shift
        mixed = nn.functional.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h))
        x = x + self.out(mixed)
        return x + self.down(nn.functional.gelu(self.up(nn.functional.layer_norm(x, (WIDTH,)))))


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.time = nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x, timestep):
        time_SK = self.time(timestep.view(1, 1)).expand(len(x), -1)
        for block in self.blocks:
            x = block(x, time_SK)
        return x


class ToyDenoiser(Denoiser):
    def __init__(self, bundle, sigma_T1):
        self.dtype, self.sigma_T1 = bundle.dtype, sigma_T1

    def calls(self, x, step, conditioning):
        return (Call(inputs={"x": x.to(self.dtype), "timestep": self.sigma_T1[step].to(x.device, self.dtype)}),)

    def combine(self, outputs, step):
        [output] = outputs
        return output if output.dtype == torch.float64 else output.float()

    def output_of(self, returned):
        return returned


class ToyBundle(Bundle):
    blocks: ClassVar = {"blocks": "block"}
    rules: ClassVar = (Rule(r"time", "float", "time embedder"), Rule(r"blocks\.\d+\.modulation", "modulation"),
                       Rule(r"blocks\..+", "quantize"))

    def settle(self, asked):
        pass  # it takes nothing

    def denoiser(self, integrator):
        return ToyDenoiser(self, integrator.sigma_T1)

    def integrator(self, steps):
        return straight(steps)

    def sigma_of(self, kwargs):
        return kwargs["timestep"]

    def _encode(self, prompts):
        return Conditioning(per_sample={"none": torch.zeros(len(prompts), 1)}, shared={}).to(self.device)

    def example(self, device):
        return torch.zeros(1, TOKENS, WIDTH, device=device), self._encode([""]).to(device)

    def noise(self, seeds):
        return torch.stack([torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(s)) for s in seeds]).to(self.device)

    def modulation_input(self, integrator, steps, conditioning):
        samples = len(conditioning.per_sample["none"])
        told = integrator.sigma_T1.to(conditioning.per_sample["none"].device, self.dtype)
        return torch.stack([self.transformer.time(told[step].view(1, 1)).expand(samples, -1) for step in steps])

    def decode(self, latent):
        return Media.of_images(np.zeros((len(latent), 1, 1, 3), np.uint8))


def straight(steps):
    """Euler on a straight line of noise levels from 1 to 0."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return Integrator.of(FlowMatchEulerDiscreteScheduler(), steps, sigmas=np.linspace(1.0, 1 / steps, steps))


def make_toy():
    """The same random weights every time."""
    torch.manual_seed(0)
    return ToyBundle(name="toy", source="toy", pipeline=SimpleNamespace(transformer=Toy()), model_hash="toy-model-hash",
                     device=torch.device("cpu"))


def make_flux():
    """A tiny random FluxTransformer2DModel behind the real Flux family."""
    from diffusers import FluxTransformer2DModel

    from workbench.models.flux import FluxBundle

    class TinyFlux(FluxBundle):
        """Random weights; prompts become random embeddings, the schedule is a straight line."""

        def _encode(self, prompts):
            generator = torch.Generator().manual_seed(0)
            return Conditioning(
                per_sample={"encoder_hidden_states": torch.randn(len(prompts), 3, 48, generator=generator),
                            "pooled_projections": torch.randn(len(prompts), 32, generator=generator)},
                shared={"txt_ids": torch.zeros(3, 3), "img_ids": torch.zeros(4, 3)}).to(self.device)

        def example(self, device):
            return torch.zeros(1, 4, 64, device=device), self._encode([""]).to(device)

        def noise(self, seeds):
            return torch.stack([torch.randn(4, 64, generator=torch.Generator().manual_seed(s)) for s in seeds]).to(self.device)

        def decode(self, latent):
            return Media.of_images(np.zeros((len(latent), 1, 1, 3), np.uint8))

        def integrator(self, steps):
            return straight(steps)

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(in_channels=64, num_layers=1, num_single_layers=2, attention_head_dim=32,
                                         num_attention_heads=2, joint_attention_dim=48, pooled_projection_dim=32,
                                         axes_dims_rope=(8, 12, 12), guidance_embeds=False)
    pipeline = SimpleNamespace(transformer=transformer, vae_scale_factor=8, tokenizer_2=SimpleNamespace(model_max_length=3),
                               vae=SimpleNamespace(config=SimpleNamespace(sample_size=32)))
    return TinyFlux(name="tiny", source="tiny", pipeline=pipeline, model_hash="tiny-flux-hash", device=torch.device("cpu"))


def record(bundle, samples=5, steps=3):
    """A float trace of samples that have no prompts."""
    return trajectories(bundle, ("a prompt",) * samples, tuple(range(samples)), bundle.integrator(steps))


def plan_of(bundle, integrator, quant, weight_bits_L, act_bits_TL):
    """A plan whose costs are computed by the rules of `predicted_bytes`; one width for all layers may be an int, modulation then has its
    usual one."""
    layers, usual = bundle.layers, usual_bits(quant)
    if isinstance(weight_bits_L, int):
        weight_bits_L = [weight_bits_L if layer.has_act_bits else usual for layer in layers]
    if isinstance(act_bits_TL, int):
        act_bits_TL = [[act_bits_TL] * len(layers)] * integrator.steps
    widths = tuple(sorted(set(weight_bits_L)))

    def bytes_of(layer, bits):
        return predicted_bytes(layer.n_out, layer.k_in, BitChoice.of(bits, quant, layer), layer.has_bias)

    float_bytes = sum(2 * (layer.n_out * layer.k_in + layer.has_bias * layer.n_out) for layer in layers)
    costs = CostTable(weight_bits_C=widths, weight_bytes_LC=torch.tensor([[bytes_of(layer, bits) for bits in widths] for layer in layers]),
                      fixed_bytes=bundle.float_bytes - float_bytes, macs_L=torch.tensor([layer.macs_per_step for layer in layers]),
                      usual_bits_L=tuple(None if layer.has_act_bits else usual for layer in layers))
    return make_plan(layers=layers, sigma_T=integrator.sigma_T1[:-1].tolist(), act_bits_TL=act_bits_TL, costs=costs, quant=quant,
                     weight_choice_L=[BitChoice.of(bits, quant, layer) for bits, layer in zip(weight_bits_L, layers)],
                     model_hash=bundle.model_hash)


def method_plan(bundle, integrator, quant, weight_bits, act_bits):
    """The uniform plan of a method's options, with the costs that the pipeline would give it."""
    from workbench import pipeline

    return pipeline.uniform_plan(bundle, quant, integrator.sigma_T1[:-1].tolist(), weight_bits, act_bits)


@torch.no_grad()
def output(model, trace, step=0, rows=slice(None)):
    """A model's output at the float latents of a step; `model` is the float bundle or a quantized model."""
    return model.predictor(trace.integrator, trace.conditioning.rows(rows))(trace.latent_ST[rows, step], step)


def final_latent(model, trace):
    """Where a model's own rollout from the trace's noise ends."""
    return denoise(model, trace.integrator, trace.latent_ST[:, 0], trace.conditioning)


def solve(bundle, trace, alpha_TL, quant, widths, **more):
    """A bank solved on a trace."""
    return solve_bank(bundle, Calibration(trace=trace, alpha_TL=alpha_TL), quant, widths, **more)
