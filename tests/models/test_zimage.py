"""The Z-Image family against diffusers' own pipeline, tiny and of the real classes."""

from dataclasses import replace
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
import transformers

from tests.models.text import qwen2_tokenizer, qwen3_config
from tests.quant.toy import final_latent, plan_of, solve
from workbench import export, exported, folders, sensitivity
from workbench import pipeline as stages
from workbench.models import sources
from workbench.models.denoiser import denoise
from workbench.models.fit import FITS
from workbench.models.integrator import Adjoint
from workbench.models.zimage import ZImageBundle
from workbench.options import BadInput, GenerationConfig, ModelSpec, QuantConfig, SensitivityConfig, TraceConfig
from workbench.quant.modulation import CachedModulation
from workbench.quant.quantize import build
from workbench.replay.backward import backward
from workbench.replay.trace import record, trajectories

SHORT, LONG = "a red fox", "two foxes in the snow, under a pale moon, before a dark wood"  # 32 and 96 tokens, filled up
GENERATIONS = {
    "guided": GenerationConfig(height=32, width=32),
    "not square": GenerationConfig(height=32, width=48, guidance=0.0),
    "negative": GenerationConfig(height=48, width=32, guidance=3.0, negative_prompt="blurry, of a low quality"),
    "weak": GenerationConfig(height=32, width=32, guidance=0.5),
    "cut short": GenerationConfig(height=32, width=32, text_tokens=24),
}


def tiny_pipeline(dtype=torch.float32, **scheduler):
    torch.manual_seed(0)
    tokenizer = qwen2_tokenizer(model_max_length=256)
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=8, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[8, 4, 4],
        axes_lens=[256, 64, 64])
    with torch.no_grad():  # they are empty until trained
        transformer.x_pad_token.normal_()
        transformer.cap_pad_token.normal_()
    made = diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}), tokenizer=tokenizer, transformer=transformer,
        text_encoder=transformers.Qwen3Model(qwen3_config(tokenizer)).eval(),
        vae=diffusers.AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=2,
                                    up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=8, scaling_factor=0.3611, shift_factor=0.1159,
                                    sample_size=32))
    return made if dtype == torch.float32 else made.to(dtype)


def bundle_of(pipeline, generation=GENERATIONS["guided"]):
    pipeline.set_progress_bar_config(disable=True)
    return ZImageBundle(name="tiny", source="tiny", pipeline=pipeline, model_hash="tiny-z-image-hash", device=torch.device("cpu"),
                        generation=generation)


@pytest.fixture(scope="module")
def tiny():
    return bundle_of(tiny_pipeline())


def drawn(bundle, prompts, seeds, steps=3):
    return trajectories(bundle, prompts, seeds, bundle.integrator(steps)).latent_ST[:, -1]


def drawn_by_pipeline(bundle, prompts, seeds, output_type="latent", steps=3):
    asked = bundle.generation
    given = {"guidance_scale": asked.guidance, "max_sequence_length": asked.text_tokens}
    return bundle.pipeline(
        list(prompts), height=asked.height, width=asked.width, num_inference_steps=steps, output_type=output_type,
        negative_prompt=[asked.negative_prompt] * len(prompts) if asked.negative_prompt else None,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds], **{k: v for k, v in given.items() if v is not None}).images


@pytest.mark.parametrize("name", GENERATIONS)
def test_latents_are_the_pipelines_own_bit_for_bit(tiny, name):
    bundle = tiny.at(GENERATIONS[name])
    for prompt in (SHORT, LONG):
        mine = drawn(bundle, [prompt], [7])
        assert mine.shape == (1, 8, bundle.height // 2, bundle.width // 2) and bool(mine.std() > 0.1)
        assert torch.equal(mine, drawn_by_pipeline(bundle, [prompt], [7]))


def test_the_configurations_draw_different_images(tiny):
    """Else the test above would compare nothing: the options must reach the model."""
    square = {name: drawn(tiny.at(GenerationConfig(height=32, width=32, **more)), [SHORT], [7]) for name, more in {
        "default": {}, "off": {"guidance": 0.0}, "one": {"guidance": 1.0}, "negative": {"negative_prompt": "blurry"},
        "cut short": {"text_tokens": 4}}.items()}
    names = list(square)
    assert all(not torch.allclose(square[a], square[b], atol=1e-4) for i, a in enumerate(names) for b in names[:i])


@pytest.mark.parametrize("scheduler", [{"use_dynamic_shifting": True}, {"shift": 6.0}])
def test_other_schedules_are_followed(scheduler):
    bundle = bundle_of(tiny_pipeline(**scheduler), GENERATIONS["not square"])
    assert torch.equal(drawn(bundle, [SHORT], [3]), drawn_by_pipeline(bundle, [SHORT], [3]))


@pytest.mark.parametrize("name", ["guided", "negative", "not square"])
def test_prompts_of_two_lengths_in_one_batch(tiny, name):
    """Equal to the pipeline's batch; a batch masks what fills up the shorter text, which changes rounding alone."""
    bundle, prompts = tiny.at(GENERATIONS[name]), [SHORT, LONG]
    lengths = [len(text) for text in bundle.encode(prompts).per_sample["cap_feats"]]
    assert lengths[0] < 32 < lengths[1]
    integrator = bundle.integrator(3)
    mine = denoise(bundle, integrator, bundle.noise([1, 2]), bundle.encode(prompts))
    assert torch.equal(mine, drawn_by_pipeline(bundle, prompts, [1, 2])) and prompts == [SHORT, LONG]
    singles = torch.cat([drawn(bundle, [prompt], [seed]) for prompt, seed in zip(prompts, (1, 2))])
    torch.testing.assert_close(mine, singles, atol=1e-5, rtol=0)


def test_images_are_the_pipelines_own(tiny):
    bundle = tiny.at(GENERATIONS["not square"])
    frames = bundle.decode(drawn(bundle, [SHORT, LONG], [1, 2])).images
    theirs = drawn_by_pipeline(bundle, [SHORT, LONG], [1, 2], output_type="np")
    assert frames.shape == (2, 32, 48, 3) and np.ptp(frames) > 20
    assert np.abs((theirs * 255).round().astype(int) - frames.astype(int)).max() <= 1


def test_every_linear_has_a_rule_and_the_table_knows_who_reads_what(tiny):
    linears = [name for name, module in tiny.transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    assert sorted([layer.name for layer in tiny.layers] + list(tiny.protected)) == sorted(linears)
    assert tiny.protected == {
        "all_x_embedder.2-1": "input projection", "cap_embedder.1": "text projection", "t_embedder.mlp.0": "time embedder",
        "t_embedder.mlp.2": "time embedder", "all_final_layer.2-1.adaLN_modulation.1": "final modulation",
        "all_final_layer.2-1.linear": "output projection"}
    image, text = 64, 256 - 32  # 8 x 8; the longest text that the axis of positions has room for
    tokens = {"noise_refiner": image, "context_refiner": text, "layers": image + text}
    expected = []
    for stack, label, blocks in (("noise_refiner", "noise_refiner", 1), ("context_refiner", "context_refiner", 1), ("layers", "layer", 2)):
        for number in range(blocks):
            roles = {"attention.to_q": "attention.to_q", "attention.to_k": "attention.to_q", "attention.to_v": "attention.to_q",
                     "attention.to_out.0": "attention.to_out.0", "feed_forward.w1": "feed_forward.w1",
                     "feed_forward.w3": "feed_forward.w1", "feed_forward.w2": "feed_forward.w2"}
            if stack != "context_refiner":
                expected.append((f"{stack}.{number}.adaLN_modulation.0", f"{label}.{number}", 1, "noise_refiner.0.adaLN_modulation.0",
                                 f"{stack}.{number}.adaLN_modulation.0", "modulation"))
            expected += [(f"{stack}.{number}.{role}", f"{label}.{number}", tokens[stack], f"{stack}.{number}.{first}",
                          f"{stack}.{number}.{first}", "quantize") for role, first in roles.items()]
    assert [(layer.name, layer.block, layer.tokens, tiny.layers[layer.same_input].name, tiny.layers[layer.fused_with].name, layer.kind)
            for layer in tiny.layers] == expected
    assert {layer.calls for layer in tiny.layers} == {2}
    assert {layer.calls for layer in tiny.at(GENERATIONS["not square"]).layers} == {1}


def test_sequences_are_counted_filled_up(tiny):
    bundle = tiny.at(GenerationConfig(height=32, width=48, guidance=0.0, text_tokens=40))
    assert bundle.image_tokens == 96 and {layer.tokens for layer in bundle.layers} == {1, 96, 64, 160}
    assert {layer.tokens for layer in tiny.at(GenerationConfig(height=16, width=48, text_tokens=8)).layers} == {1, 64, 32, 96}  # of 48


@pytest.mark.parametrize(("asked", "line"), [
    ({"height": 34}, "34 x 256 pixels: height and width must be divisible by 4"),
    ({"width": 512}, "256 x 512 pixels; this model draws at most 256 x 256"),
    ({"text_tokens": 225}, "225 text tokens; this model reads at most 224"),
    ({"guidance": 0, "negative_prompt": "dark"},
     "a negative prompt does nothing at guidance 0; give a guidance above it, or no negative prompt"),
    ({"frames": 5}, "frames: a ZImagePipeline has none; leave it empty"),
    ({"true_guidance": 2}, "true guidance: a ZImagePipeline has none; leave it empty"),
    ({"guidance_2": 2}, "guidance 2: a ZImagePipeline has none; leave it empty"),
])
def test_what_the_pipeline_does_not_take_is_refused_in_one_line(tiny, asked, line):
    with pytest.raises(BadInput) as error:
        tiny.at(GenerationConfig(**asked))
    assert str(error.value) == line


def test_the_defaults_are_the_pipelines_own(tiny):
    bundle = tiny.at(GenerationConfig())
    assert (bundle.height, bundle.width, bundle.text_tokens, bundle.guidance) == (256, 256, 224, 5.0)


def test_the_longest_text_and_the_largest_image_can_be_drawn(tiny):
    """The positions of the last token are the last in the model's table."""
    bundle = tiny.at(GenerationConfig(height=256, width=16, guidance=0.0))
    assert bool(torch.isfinite(drawn(bundle, ["snow " * 200], [0], steps=1)).all())
    assert len(bundle.encode(["snow " * 200]).per_sample["cap_feats"][0]) == 224


def test_looking_at_shapes_leaves_the_rotary_table_where_it_was():
    bundle = bundle_of(tiny_pipeline())
    before = drawn(bundle, [SHORT], [0], steps=1)
    table = bundle.transformer.rope_embedder.freqs_cis
    assert torch.equal(drawn(bundle.at(GENERATIONS["weak"]).at(bundle.generation), [SHORT], [0], steps=1), before)
    assert bundle.transformer.rope_embedder.freqs_cis is table and not any(part.is_meta for part in table)


def test_the_adjoint_is_the_gradient_of_the_whole_rollout(tiny):
    """One probe, walked step by step, against autograd through all steps, their guidance and the sampler at once."""
    integrator, conditioning, noise = tiny.integrator(3), tiny.encode([SHORT, LONG]), tiny.noise([1, 2])
    predict = tiny.predictor(integrator, conditioning)
    start, r = noise.clone().requires_grad_(), torch.randn(noise.shape, generator=torch.Generator().manual_seed(0))
    states = [integrator.start(start)]
    for step in range(3):
        states.append(integrator.advance(states[-1], predict(states[-1].latent, step), step))
    [whole] = torch.autograd.grad(states[-1].latent, start, r)
    adjoint = Adjoint(integrator, r)
    for step in reversed(range(3)):
        latent = states[step].latent.detach().requires_grad_()
        adjoint.add(step, torch.autograd.grad(predict(latent, step), latent, adjoint.seed(step))[0])
    torch.testing.assert_close(adjoint.costates(-1)[0], whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["guided", "not square"])
def test_a_profile_is_finite_and_positive(tiny, name):
    bundle, quant = tiny.at(GENERATIONS[name]), QuantConfig(group_size=32)
    trace = record(bundle, TraceConfig(prompts=(SHORT, LONG), steps=3))
    found = sensitivity.profile(bundle, trace, SensitivityConfig(probes=2), quant)
    assert bool((found.fisher_TL > 0).all()) and bool((found.act_absmax_TL > 0).all())
    acts = [layer.index for layer in bundle.layers if layer.has_act_bits]
    assert bool((found.directional_TLC[:, acts, :-1] > 0).all())


def test_a_whole_profile_runs(tiny):
    profiled = stages.profile(tiny, TraceConfig(prompts=(SHORT, LONG), steps=3), SensitivityConfig(probes=1), QuantConfig(group_size=32),
                              target="h100")
    assert bool((profiled.sensitivity.fisher_TL > 0).all())
    assert float(profiled.costs.macs_L.sum()) == sum(layer.macs_per_step for layer in tiny.layers)


def quantized_at(bundle, trace, bits, quant):
    bank = solve(bundle, trace, None, quant, (bits,))
    return build(bundle, bank, plan_of(bundle, trace.integrator, quant, bits, bits))


@pytest.mark.parametrize("name", ["guided", "not square"])
def test_sixteen_bits_are_the_float_model_and_four_are_not(tiny, name):
    bundle, quant = tiny.at(GENERATIONS[name]), QuantConfig(group_size=32, modulation_bits=16)
    trace = record(bundle, TraceConfig(prompts=(SHORT, LONG), steps=3))
    assert torch.equal(final_latent(quantized_at(bundle, trace, 16, quant), trace), trace.latent_ST[:, -1])
    quantized = quantized_at(bundle, trace, 4, quant)
    difference = (final_latent(quantized, trace) - trace.latent_ST[:, -1]).square().mean() / trace.latent_ST[:, -1].square().mean()
    assert 1e-4 < float(difference) < 1 and quantized.weight_bytes == quantized.plan.weight_bytes < bundle.float_bytes


def test_cached_modulation_serves_the_doubled_call(tiny):
    trace = record(tiny, TraceConfig(prompts=(SHORT, LONG), steps=3))
    cached = quantized_at(tiny, trace, 16, QuantConfig(group_size=32, modulation_bits=16, modulation="cached"))
    predict = cached.predictor(trace.integrator, trace.conditioning)
    layers = [module for module in cached.layers.values() if isinstance(module, CachedModulation)]
    for module in layers:
        module._float = []  # what was not cached would raise
    for step in range(3):
        torch.testing.assert_close(predict(trace.latent_ST[:, step], step), trace.output_ST[:, step], rtol=1e-4, atol=1e-5)
    assert len(layers) == 3


def test_a_quantized_transformer_in_the_plain_pipeline_finds_its_steps(tiny):
    """The pipeline gives its time by position."""
    bundle, quant = tiny.at(GENERATIONS["not square"]), QuantConfig(group_size=32, modulation_bits=16)
    trace = record(bundle, TraceConfig(prompts=(SHORT,), steps=3, seed=5))
    rows = [[bits] * len(bundle.layers) for bits in (8, 4, 16)]
    quantized = build(bundle, solve(bundle, trace, None, quant, (8,)), plan_of(bundle, trace.integrator, quant, 8, rows))
    plain = diffusers.ZImagePipeline(**{**bundle.pipeline.components, "transformer": quantized.modules["transformer"]})
    plain.set_progress_bar_config(disable=True)
    drawn_plain = plain([SHORT], height=32, width=48, num_inference_steps=3, guidance_scale=0.0, output_type="latent",
                        generator=torch.Generator().manual_seed(5)).images
    assert torch.equal(drawn_plain, final_latent(quantized, trace))
    assert not torch.allclose(drawn_plain, trace.latent_ST[:, -1], atol=1e-4)


def test_in_bfloat16_latents_and_guidance_stay_float32():
    bundle = bundle_of(tiny_pipeline(torch.bfloat16), GENERATIONS["negative"])
    assert bundle.dtype == torch.bfloat16
    mine = drawn(bundle, [LONG], [4])
    assert mine.dtype == torch.float32 and torch.equal(mine, drawn_by_pipeline(bundle, [LONG], [4]))


def test_masked_tokens_have_no_gradient(tiny):
    """What fills the shorter text of a batch up to the longer one says nothing."""
    trace, seen = record(tiny, TraceConfig(prompts=(SHORT, LONG), steps=1)), {}

    class Keep:
        def begin(self, step, rows, adjoint):
            assert rows == slice(0, 2)

        def visit(self, step, rows, group):
            seen.update({each.layer.name: each.g for each in group})

    backward(tiny, trace, torch.randn(1, *trace.output_ST[:, 0].shape, generator=torch.Generator().manual_seed(0)), [Keep()])
    for name, first in (("context_refiner.0.feed_forward.w2", 32), ("layers.0.feed_forward.w2", 64 + 32)):
        cond, uncond = (g[0].norm(dim=-1) for g in seen[name])
        assert bool((cond[1] > 0).all() and (cond[0, :first] > 0).all()) and not bool(cond[0, first:].any())
        assert bool((uncond[:, :first] > 0).all()) and not bool(uncond[:, first:].any())


def test_a_model_rounded_to_bfloat16_has_gradients(tiny):
    bundle = tiny.in_dtype(torch.bfloat16)
    integrator, conditioning = bundle.integrator(3), bundle.encode([SHORT, LONG])
    x = bundle.noise([1, 2]).requires_grad_()
    [call] = bundle.denoiser(integrator).calls(x, 1, conditioning)
    assert call.inputs["t"].dtype == torch.float32 and {part.dtype for part in call.inputs["x"]} == {torch.bfloat16}
    output = bundle.predictor(integrator, conditioning)(x, 1)
    [gradient] = torch.autograd.grad(output.square().sum(), x)
    assert output.dtype == gradient.dtype == torch.float32 and bool((gradient.flatten(1).norm(dim=1) > 0).all())
    with torch.no_grad():
        reference = tiny.predictor(integrator, conditioning)(x, 1)
    assert 0 < float((output.detach() - reference).norm() / reference.norm()) < 0.1


def test_a_saved_pipeline_loads_and_draws_the_same(tiny, tmp_path):
    folder = tmp_path / "zimage"
    tiny.pipeline.save_pretrained(folder)
    loaded = sources.load(ModelSpec(source=str(folder), device="cpu")).at(tiny.generation)
    assert torch.equal(drawn(loaded, [LONG], [9]), drawn(tiny, [LONG], [9]))


def test_an_exported_model_loads_and_draws_the_same(tiny, tmp_path):
    tiny.pipeline.save_pretrained(tmp_path / "zimage")
    bundle = sources.load(ModelSpec(source=str(tmp_path / "zimage"), device="cpu")).at(tiny.generation)
    trace = record(bundle, TraceConfig(prompts=(SHORT, LONG), steps=2))
    quantized = quantized_at(bundle, trace, 4, QuantConfig(group_size=32, modulation_bits=16))
    assert export.write(bundle, quantized, tmp_path / "out").weight_bytes == quantized.weight_bytes
    loaded, again = exported.load_quantized(tmp_path / "out", "cpu")
    loaded = loaded.at(bundle.generation)
    assert torch.equal(final_latent(replace(again, bundle=loaded), trace), final_latent(quantized, trace))
    assert torch.equal(loaded.encode([LONG]).per_sample["cap_feats"][0], bundle.encode([LONG]).per_sample["cap_feats"][0])


def test_the_tokenizers_chat_template_is_a_file_of_its_part(tiny, tmp_path):
    tiny.pipeline.tokenizer.save_pretrained(tmp_path / "tokenizer")
    names = [f"tokenizer/{path.name}" for path in sorted((tmp_path / "tokenizer").iterdir())]
    assert "tokenizer/chat_template.jinja" in names and folders.wanted(names, ["tokenizer"]) == names


@pytest.mark.parametrize(("change", "line"), [
    (lambda p: p.vae.register_to_config(latent_channels=4), "in_channels is 8; 4 is needed"),
    (lambda p: p.transformer.register_to_config(cap_feat_dim=20), "cap_feat_dim is 20; 16 is needed"),
    (lambda p: p.transformer.register_to_config(all_patch_size=(1,)), "all_patch_size and all_f_patch_size are"),
    (lambda p: p.transformer.register_to_config(siglip_feat_dim=8), "siglip_feat_dim is 8; None is needed"),
    (lambda p: p.transformer.register_to_config(axes_dims=[9, 3, 4]), "three even numbers"),
    (lambda p: p.transformer.register_to_config(axes_lens=[33, 64, 64]), "at least 34, 1 and 1 positions"),
    (lambda p: p.transformer.register_to_config(axes_lens=[64, 10**12, 64]), "at most 65,536"),
    (lambda p: p.vae.register_to_config(shift_factor=None), "shift_factor is None; a finite number"),
    (lambda p: setattr(p.text_encoder.config, "vocab_size", 100), "text_encoder embeds 100"),
    (lambda p: setattr(p.tokenizer, "chat_template", None), "tokenizer has no chat template"),
])
def test_parts_that_do_not_belong_together_are_refused(change, line):
    pipeline = tiny_pipeline()
    models = {name: getattr(pipeline, name) for name in ("transformer", "vae", "text_encoder")}
    FITS["ZImagePipeline"](models, {"tokenizer": pipeline.tokenizer})
    change(pipeline)
    with pytest.raises(BadInput) as error:
        FITS["ZImagePipeline"](models, {"tokenizer": pipeline.tokenizer})
    assert line in str(error.value) and "\n" not in str(error.value)


def test_the_published_configuration():
    """Z-Image and Z-Image-Turbo: the defaults of the class, 1024 x 1024 pixels, 512 text tokens."""
    with torch.device("meta"):
        transformer = diffusers.ZImageTransformer2DModel()
    pipeline = SimpleNamespace(transformer=transformer, vae_scale_factor=8, tokenizer=SimpleNamespace(model_max_length=131072),
                               scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    bundle = ZImageBundle(name="full", source="full", pipeline=pipeline, model_hash="full", device=torch.device("meta"))
    kinds = [layer.kind for layer in bundle.layers]
    assert len(bundle.layers) + len(bundle.protected) == 276
    assert (kinds.count("quantize"), kinds.count("modulation"), len(bundle.protected)) == (238, 32, 6)
    assert bundle.parameters == 6_154_908_736
    width, hidden, image, text = 3840, 10240, 4096, 512
    block = 4 * width * width + 3 * width * hidden
    macs = 2 * (block * (2 * image + 2 * text + 30 * (image + text)) + 32 * 256 * 4 * width)
    assert sum(layer.macs_per_step for layer in bundle.layers) == macs
    assert sum(layer.macs_per_step for layer in bundle.at(GenerationConfig(guidance=0.0)).layers) == macs // 2
    assert (bundle.height, bundle.width, bundle.text_tokens, bundle.guidance) == (1024, 1024, 512, 5.0)
