"""Fixtures of the quantization tests."""

from types import SimpleNamespace

import pytest
import torch

from tests.quant.toy import make_toy, record


@pytest.fixture
def toy():
    return make_toy()


@pytest.fixture
def toy_trace(toy):
    return record(toy)


@pytest.fixture(scope="module")
def flux():
    """A tiny random FluxTransformer2DModel behind the real Flux family."""
    from diffusers import FluxTransformer2DModel

    from workbench.families.flux import FluxBundle
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
