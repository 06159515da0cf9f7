"""Layers observed in one forward, on tiny transformers of several families and on the meta device."""

from typing import ClassVar

import diffusers as d
import pytest
import torch
from torch import nn

from workbench.models import tree
from workbench.models.denoiser import Call, Denoiser
from workbench.models.discover import Rule, Segment, discover
from workbench.options import BadInput
from workbench.types import Conditioning

NOTHING = Conditioning(per_sample={}, shared={})


class OneCall(Denoiser):
    """Hands a transformer its inputs; what it returns does not matter here."""

    def __init__(self, *calls):
        self._calls = calls

    def calls(self, x, step, conditioning):
        return self._calls


def found(model, inputs, rules, blocks, *, meta=True, calls=None):
    model = tree.on_meta(model.eval()) if meta else model.eval()
    moved = {name: _moved(value, "meta" if meta else "cpu") for name, value in inputs.items()}
    calls = calls or (Call(inputs=moved),)
    return discover({"transformer": model}, OneCall(*calls), torch.zeros(1), NOTHING, steps=(0,), rules=rules, blocks=blocks).layers


def _moved(value, device):
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return [each.to(device) for each in value] if isinstance(value, list) and isinstance(value[0], torch.Tensor) else value


ANY = (Rule(r".*", "quantize"),)


def wan(layers=2):
    torch.manual_seed(0)
    return d.WanTransformer3DModel(num_attention_heads=4, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=32, freq_dim=16,
                                   ffn_dim=64, num_layers=layers, rope_max_seq_len=32)


WAN_INPUTS = {"hidden_states": torch.zeros(1, 4, 3, 8, 8), "timestep": torch.tensor([500]), "encoder_hidden_states": torch.zeros(1, 8, 32)}


def test_text_keys_and_values_of_all_of_wans_blocks_read_one_tensor_and_are_siblings_by_block():
    layers = found(wan(3), WAN_INPUTS, ANY, {"blocks": "block"}, meta=False)
    text = [layer for layer in layers if layer.role in ("attn2.to_k", "attn2.to_v")]
    assert len(text) == 6 and len({layer.same_input for layer in text}) == 1
    assert [layers[layer.fused_with].name for layer in text] == [f"blocks.{i}.attn2.to_k" for i in range(3) for _ in range(2)]
    assert {layer.tokens for layer in text} == {8}
    indices = [layer.index for layer in text]
    assert indices != list(range(indices[0], indices[0] + 6)), "these layers do not follow each other"
    own = [layer for layer in layers if layer.role in ("attn1.to_q", "attn1.to_k", "attn1.to_v")]
    assert len({layer.same_input for layer in own}) == 3 and all(layer.same_input == layer.fused_with for layer in own)


def test_z_images_lists_are_taken_and_its_padded_tokens_counted():
    torch.manual_seed(0)
    model = d.ZImageTransformer2DModel(in_channels=4, dim=64, n_layers=1, n_refiner_layers=1, n_heads=4, n_kv_heads=4, cap_feat_dim=32,
                                       axes_dims=[4, 6, 6], axes_lens=[64, 64, 64])
    inputs = {"x": [torch.zeros(4, 1, 8, 8)], "t": torch.tensor([0.5]), "cap_feats": [torch.zeros(8, 32)]}
    for pad in (model.x_pad_token, model.cap_pad_token):
        nn.init.zeros_(pad)
    layers = found(model, inputs, ANY, {"layers": "layer", "noise_refiner": "noise", "context_refiner": "context"}, meta=False)
    by_name = {layer.name: layer for layer in layers}
    assert by_name["layers.0.attention.to_q"].tokens == 64 and by_name["context_refiner.0.attention.to_q"].tokens == 32
    assert by_name["layers.0.feed_forward.w3"].same_input == by_name["layers.0.feed_forward.w1"].index


def test_flux_2s_fused_linears_fall_into_segments_with_shapes_of_their_own():
    torch.manual_seed(0)
    model = d.Flux2Transformer2DModel(in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=4,
                                      joint_attention_dim=32, axes_dims_rope=(4, 4, 4, 4))
    inputs = {"hidden_states": torch.zeros(1, 16, 16), "encoder_hidden_states": torch.zeros(1, 8, 32), "timestep": torch.tensor([0.5]),
              "img_ids": torch.zeros(1, 16, 4), "txt_ids": torch.zeros(1, 8, 4), "guidance": torch.tensor([3.5])}
    inner = 64
    rules = (Rule(r"single_transformer_blocks\.\d+\.attn\.to_qkv_mlp_proj", "quantize", segments=lambda linear: (
                 Segment(role="qkv", rows=(0, 3 * inner)), Segment(role="mlp", rows=(3 * inner, linear.out_features)))),
             Rule(r"single_transformer_blocks\.\d+\.attn\.to_out", "quantize", segments=lambda linear: (
                 Segment(role="attention", columns=(0, inner)), Segment(role="mlp", columns=(inner, linear.in_features)))),
             *ANY)
    layers = found(model, inputs, rules, {"transformer_blocks": "double", "single_transformer_blocks": "single"})
    by_name = {layer.name: layer for layer in layers}
    qkv, mlp = (by_name[f"single_transformer_blocks.0.attn.to_qkv_mlp_proj.{part}"] for part in ("qkv", "mlp"))
    assert (qkv.n_out, qkv.rows) == (192, (0, 192)) and mlp.rows[0] == 192 and qkv.k_in == mlp.k_in == inner
    assert mlp.same_input == mlp.fused_with == qkv.index, "rows of one linear read one tensor"
    attention, wide = (by_name[f"single_transformer_blocks.0.attn.to_out.{part}"] for part in ("attention", "mlp"))
    assert (attention.k_in, attention.columns) == (inner, (0, inner)) and attention.n_out == wide.n_out == inner
    assert wide.same_input == wide.index, "other columns are another input"
    linear = model.get_submodule(qkv.module_name)
    assert qkv.n_out + mlp.n_out == linear.out_features and qkv.name != qkv.module_name


class Twice(nn.Module):
    """Reads one tensor by two layers that do not follow each other, and runs one of them twice."""

    def __init__(self):
        super().__init__()
        self.first, self.between, self.second, self.extra = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        y = self.between(self.first(x))
        return (self.second(x) + y,)


def test_layers_of_one_input_need_not_follow_each_other_and_calls_are_counted():
    rules = (Rule("extra", "float", "kept"), Rule(".*", "quantize"))
    x, other = torch.zeros(4, 5, 8), torch.zeros(4, 5, 8)
    calls = (Call(branch="cond", rows=2, inputs={"x": x}), Call(branch="uncond", rows=2, inputs={"x": other}))
    layers = found(Twice(), {}, rules, {}, meta=False, calls=calls)
    assert [layer.name for layer in layers] == ["first", "between", "second"]
    assert [layer.same_input for layer in layers] == [0, 1, 0]
    assert {(layer.tokens, layer.calls) for layer in layers} == {(10, 4)}, "four rows of five tokens, two to a sample; two calls"
    assert layers[0].macs_per_step == 4 * 10 * 64


@pytest.mark.parametrize(("rules", "words"), [
    ((Rule("first|between|second", "quantize"),), "layer extra is not one this family knows"),
    ((Rule(".*", "quantize"),), "layer extra is in the model and never runs"),
])
def test_a_linear_that_no_rule_names_or_that_never_runs_is_refused(rules, words):
    with pytest.raises(BadInput, match=words):
        found(Twice(), {"x": torch.zeros(1, 5, 8)}, rules, {}, meta=False)


def test_segments_must_cover_their_linear():
    rules = (Rule("first", "quantize", segments=lambda _: (Segment(role="a", rows=(0, 3)), Segment(role="b", rows=(4, 8)))),
             Rule(".*", "float"))
    with pytest.raises(ValueError, match="do not cover its 8 rows"):
        found(Twice(), {"x": torch.zeros(1, 5, 8)}, rules, {}, meta=False)


class TwoTrees(Denoiser):
    """Noisy steps run one transformer, the others another."""

    steps: ClassVar = ("transformer", "transformer", "transformer_2")

    def calls(self, x, step, conditioning):
        return (Call(module=self.steps[step], inputs={"x": x}),)


def test_each_of_two_transformers_is_seen_at_the_step_where_it_runs():
    modules = {"transformer": Twice(), "transformer_2": Twice()}
    rules = (Rule("extra", "float"), Rule(".*", "quantize"))
    layers = discover(modules, TwoTrees(), torch.zeros(1, 5, 8), NOTHING, steps=range(3), rules=rules, blocks={}).layers
    assert [layer.name for layer in layers] == [f"{name}.{role}" for name in modules for role in ("first", "between", "second")]
    assert {layer.module_name for layer in layers} == {"first", "between", "second"} and layers[3].module == "transformer_2"
    assert layers[5].same_input == 3 and layers[3].same_input == 3


def test_a_clone_shares_its_tensors_and_nothing_else():
    model = Twice()
    own = tree.clone_tree(model)
    assert all(p is q for p, q in zip(model.parameters(), own.parameters(), strict=True))
    own.first = nn.Linear(8, 8)
    own.second.register_forward_hook(lambda *_: pytest.fail("a hook of the clone ran in the original"))
    before = model(torch.ones(1, 8))[0]
    assert torch.equal(model(torch.ones(1, 8))[0], before) and model.first is not own.first
    meta = tree.on_meta(model)
    assert {p.device.type for p in meta.parameters()} == {"meta"} and {p.device.type for p in model.parameters()} == {"cpu"}
    halved = tree.as_dtype(model, torch.bfloat16)
    assert {p.dtype for p in halved.parameters()} == {torch.bfloat16} and {p.dtype for p in model.parameters()} == {torch.float32}
    replaced = tree.with_modules(model, {"between": nn.Identity()})
    assert isinstance(replaced.between, nn.Identity) and isinstance(model.between, nn.Linear)


def test_tied_weights_stay_tied_in_a_clone_of_another_type():
    model = Twice()
    model.second.weight = model.first.weight
    halved = tree.as_dtype(model, torch.float64)
    assert halved.second.weight is halved.first.weight
