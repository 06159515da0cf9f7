"""A toy family for the quantization tests: a residual network with the parts of a transformer, in a real Bundle."""

from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from workbench.models.bundle import Bundle
from workbench.plans import BitChoice, CostTable, make_plan
from workbench.quant.quantize import modulation_choice, predicted_bytes
from workbench.types import Conditioning, LayerInfo, Schedule, Trace

WIDTH, HIDDEN, TOKENS = 64, 160, 6
ROLES = {"q": ("q", WIDTH, WIDTH), "k": ("q", WIDTH, WIDTH), "v": ("q", WIDTH, WIDTH), "out": ("out", WIDTH, WIDTH),
         "up": ("up", HIDDEN, WIDTH), "down": ("down", WIDTH, HIDDEN)}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        for role, (_, n_out, k_in) in ROLES.items():
            self.add_module(role, nn.Linear(k_in, n_out, bias=role != "out"))
        self.modulation = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x, time_1K):
        scale, shift = self.modulation(time_1K).chunk(2, -1)
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
        time_1K = self.time(timestep.view(1, 1))
        for block in self.blocks:
            x = block(x, time_1K)
        return x


class ToyBundle(Bundle):
    def _sort_linears(self):
        layers, modulation = [], []
        for number in range(2):
            first = {role: len(layers) + i for i, role in enumerate(ROLES)}
            for role, (shared, n_out, k_in) in ROLES.items():
                layers.append(LayerInfo(index=len(layers), name=f"blocks.{number}.{role}", block=f"block.{number}", role=role,
                                        n_out=n_out, k_in=k_in, tokens=TOKENS, has_bias=role != "out",
                                        shares_input_with=first[shared]))
            modulation.append(LayerInfo(index=number, name=f"blocks.{number}.modulation", block=f"block.{number}",
                                        role="modulation", n_out=2 * WIDTH, k_in=WIDTH, tokens=1, has_bias=True,
                                        shares_input_with=number))
        return tuple(layers), tuple(modulation), {"time": "time embedder"}

    def _sigma_of(self, kwargs):
        return float(kwargs["timestep"])

    def encode(self, prompts):
        return Conditioning(per_sample={"none": torch.zeros(len(prompts), 1)}, shared={})

    def initial_latents(self, seeds):
        return torch.stack([torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(s)) for s in seeds])

    def schedule(self, steps):
        sigma_T1 = torch.linspace(1, 0, steps + 1)
        return Schedule(sigma_T1=sigma_T1, timestep_T=1000 * sigma_T1[:-1])

    def velocity(self, latent_SMD, schedule, step, conditioning):
        return self.transformer(latent_SMD, timestep=schedule.sigma_T1[step])

    def modulation_input(self, schedule, steps, conditioning):
        return torch.stack([self.transformer.time(schedule.sigma_T1[step].view(1, 1)) for step in steps])

    def decode(self, latent_SMD):
        return np.zeros((len(latent_SMD), 1, 1, 3), np.uint8)


def make_toy():
    """The same random weights every time."""
    torch.manual_seed(0)
    return ToyBundle(name="toy", source="toy", pipeline=SimpleNamespace(transformer=Toy()), model_hash="toy-model-hash",
                     device=torch.device("cpu"))


def make_flux():
    """A tiny random FluxTransformer2DModel behind the real Flux family."""
    from diffusers import FluxTransformer2DModel

    from workbench.models.flux import FluxBundle
    from workbench.types import Conditioning, Schedule

    class TinyFlux(FluxBundle):
        """Random weights; prompts become random embeddings, the schedule is a straight line."""

        def encode(self, prompts):
            generator = torch.Generator().manual_seed(0)
            return Conditioning(
                per_sample={"encoder_hidden_states": torch.randn(len(prompts), 3, 48, generator=generator),
                            "pooled_projections": torch.randn(len(prompts), 32, generator=generator)},
                shared={"txt_ids": torch.zeros(3, 3), "img_ids": torch.zeros(4, 3)})

        def initial_latents(self, seeds):
            return torch.stack([torch.randn(4, 64, generator=torch.Generator().manual_seed(s)) for s in seeds])

        def schedule(self, steps):
            sigma_T1 = torch.linspace(1, 0, steps + 1)
            return Schedule(sigma_T1=sigma_T1, timestep_T=1000 * sigma_T1[:-1])

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(in_channels=64, num_layers=1, num_single_layers=2, attention_head_dim=32,
                                         num_attention_heads=2, joint_attention_dim=48, pooled_projection_dim=32,
                                         axes_dims_rope=(8, 12, 12), guidance_embeds=False)
    pipeline = SimpleNamespace(transformer=transformer, vae_scale_factor=8, tokenizer_2=SimpleNamespace(model_max_length=3),
                               vae=SimpleNamespace(config=SimpleNamespace(sample_size=32)))
    return TinyFlux(name="tiny", source="tiny", pipeline=pipeline, model_hash="tiny-flux-hash", device=torch.device("cpu"))


@torch.no_grad()
def record(bundle, samples=5, steps=3):
    """A float trace without the trace stage."""
    schedule, seeds = bundle.schedule(steps), tuple(range(samples))
    conditioning = bundle.encode([""] * samples)
    latents, targets = [bundle.initial_latents(seeds)], []
    for t in range(steps):
        targets.append(bundle.velocity(latents[-1], schedule, t, conditioning))
        latents.append(bundle.advance(latents[-1], targets[-1], schedule, t))
    return Trace(schedule=schedule, latent_STMD=torch.stack(latents, 1), target_STMD=torch.stack(targets, 1),
                 conditioning=conditioning, prompts=("a prompt",) * samples, seeds=seeds, model_hash=bundle.model_hash)


def plan_of(bundle, schedule, quant, weight_bits_L, act_bits_TL):
    """A plan whose costs are computed by the rules of `predicted_bytes`; one width for all layers may be an int."""
    layers = bundle.layers
    if isinstance(weight_bits_L, int):
        weight_bits_L = [weight_bits_L] * len(layers)
    if isinstance(act_bits_TL, int):
        act_bits_TL = [[act_bits_TL] * len(layers)] * schedule.steps
    choices = [BitChoice(weight_bits=bits, group_size=quant.group_size) for bits in weight_bits_L]
    widths = tuple(sorted(set(weight_bits_L)))
    table = [[predicted_bytes(layer.n_out, layer.k_in, BitChoice(weight_bits=bits, group_size=quant.group_size), layer.has_bias)
              for bits in widths] for layer in layers]
    float_bytes = sum(2 * (layer.n_out * layer.k_in + layer.has_bias * layer.n_out) for layer in (*layers, *bundle.modulation))
    modulation_bytes = sum(predicted_bytes(layer.n_out, layer.k_in, modulation_choice(quant), layer.has_bias)
                           for layer in bundle.modulation)
    costs = CostTable(weight_bits_C=widths, weight_bytes_LC=torch.tensor(table),
                      fixed_bytes=bundle.float_bytes - float_bytes + modulation_bytes,
                      macs_L=torch.tensor([layer.macs_per_step for layer in layers]))
    return make_plan(layers=layers, sigma_T=schedule.sigma_T1[:-1].tolist(), weight_choice_L=choices, act_bits_TL=act_bits_TL,
                     costs=costs, quant=quant, model_hash=bundle.model_hash)


def method_plan(bundle, schedule, quant, weight_bits, act_bits):
    """The uniform plan of a method's options, with the costs that the pipeline would give it."""
    from workbench import pipeline

    return pipeline.uniform_plan(bundle, quant, schedule.sigma_T1[:-1].tolist(), weight_bits, act_bits)
