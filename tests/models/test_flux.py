"""The embedded Flux model as the stages see it."""

import numpy as np
import pytest
import torch

from workbench.models.denoiser import StepState
from workbench.options import TraceConfig
from workbench.plans import BitChoice, BitPlan, mean_act_bits
from workbench.replay.trace import record

PROMPTS = ("fluent red heart", "noto grinning face")

# What was written by hand before layers were discovered: role -> (stream, role whose input it shares), in the order of execution.
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


def test_denoising_loop_gives_the_pipelines_own_image(bundle):
    recorded = record(bundle, TraceConfig(prompts=PROMPTS, steps=3, seed=11))
    mine = bundle.decode(recorded.latent_ST[:, -1]).images
    for index, prompt in enumerate(PROMPTS):
        theirs = bundle.pipeline(prompt, num_inference_steps=3, generator=torch.Generator().manual_seed(11 + index), height=bundle.height,
                                 width=bundle.width, max_sequence_length=bundle.text_tokens, output_type="np").images[0]
        assert np.abs((theirs * 255).round().astype(int) - mine[index].astype(int)).max() <= 1  # batch of 1 against batch of 2


def test_every_linear_is_quantizable_modulation_or_kept_float(bundle):
    names = [layer.name for layer in bundle.layers] + list(bundle.protected)
    linears = [name for name, module in bundle.transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    assert sorted(names) == sorted(linears)
    assert [layer.index for layer in bundle.layers] == list(range(len(bundle.layers)))
    assert all("norm" in layer.role and layer.tokens == 1 for layer in bundle.modulation) and len(bundle.modulation) == 10


def test_the_discovered_layers_are_the_table_that_was_written_by_hand(bundle):
    tokens = {"image": bundle.image_tokens, "text": bundle.text_tokens, "both": bundle.image_tokens + bundle.text_tokens}
    expected = []
    for stack, label, roles in (("transformer_blocks", "double", DOUBLE_ROLES), ("single_transformer_blocks", "single", SINGLE_ROLES)):
        for number in range(len(getattr(bundle.transformer, stack))):
            expected += [(f"{stack}.{number}.{role}", f"{label}.{number}", role, tokens[stream], f"{stack}.{number}.{shared}")
                         for role, (stream, shared) in roles.items()]
    found = [layer for layer in bundle.layers if layer.has_act_bits]
    assert [(layer.name, layer.block, layer.role, layer.tokens, bundle.layers[layer.same_input].name) for layer in found] == expected
    assert all(layer.fused_with == layer.same_input and layer.calls == 1 for layer in found)
    for layer in bundle.layers:
        linear = bundle.linear(layer)
        assert (layer.n_out, layer.k_in, layer.has_bias) == (linear.out_features, linear.in_features, linear.bias is not None)


def plan_of(rows, sigma_T):
    return BitPlan(model_hash="0" * 16, layer_names=("a",), sigma_T=sigma_T, weight_choice_L=(BitChoice(weight_bits=4),), act_bits_TL=rows,
                   weight_bytes=1, act_bits_mean=mean_act_bits(rows), act_bits_macs=1.0, bit_ops=1.0)


def test_a_plan_of_20_steps_drives_28():
    sigma_20 = tuple(1 - t / 20 for t in range(20))
    bits = [3, 4, 6, 8, 16]
    rows = tuple((bits[t % 5],) for t in range(20))
    state = StepState(plan_of(rows, sigma_20))
    for t in range(28):
        sigma = 1 - t / 28
        state.move_to(sigma)
        nearest = min(range(20), key=lambda s: abs(sigma_20[s] - sigma))
        assert state.row == rows[nearest]


@pytest.mark.parametrize("steps", [20, 100])
def test_a_time_told_in_bfloat16_finds_its_own_step(steps):
    """Rounded to eight bits a time lies up to 0.002 from its step, farther than half the way to a neighbour."""
    sigma_T = tuple(float(s) for s in 3 * np.linspace(1, 1 / steps, steps) / (1 + 2 * np.linspace(1, 1 / steps, steps)))
    rows = tuple(((3, 4, 6, 8)[t % 4],) for t in range(steps))
    state = StepState(plan_of(rows, sigma_T))
    told = torch.tensor(sigma_T).bfloat16()
    for t in range(steps):
        state.follow(told[t])
        same = [rows[s] for s in range(steps) if told[s] == told[t]]  # steps that bfloat16 cannot tell apart
        assert state.row == same[0] and (len(same) > 1 or state.row == rows[t])
