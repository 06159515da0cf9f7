"""Size, guidance, true guidance and text length of a Flux pipeline: the same latents and images as the pipeline's own call."""

import numpy as np
import pytest
import torch

from tests.folders.tiny import tiny_pipeline
from tests.quant.toy import plan_of
from workbench import costs
from workbench.models.denoiser import denoise
from workbench.models.flux import FluxBundle
from workbench.options import BadInput, GenerationConfig, QuantConfig, TraceConfig
from workbench.plans import BitPlan
from workbench.quant.bank import Calibration, solve_bank
from workbench.quant.quantize import build
from workbench.replay.trace import record

STEPS, SEED = 3, 7
TWO = ("noto pizza", "fluent red heart on a table")


def bundle_of(**transformer):
    pipeline = tiny_pipeline(**transformer)
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.vae):
        part.eval()  # as a loaded one is
    return FluxBundle(name="tiny", source="tiny", pipeline=pipeline, model_hash="tiny-flux-hash", device=torch.device("cpu"))


@pytest.fixture(scope="module", params=[True, False], ids=["dev", "schnell"])
def flux(request):
    return bundle_of(guidance_embeds=request.param)


def asked_of(flux, **asked):
    if not flux.transformer.config.guidance_embeds:
        asked.pop("guidance", None)
    return GenerationConfig(**asked)


def theirs(flux, prompts, output_type, **given):
    """What the pipeline itself makes of the same prompts and seeds."""
    asked = flux.generation
    options = {} if asked.guidance is None else {"guidance_scale": asked.guidance}
    if asked.true_guidance is not None:
        options |= {"true_cfg_scale": asked.true_guidance, "negative_prompt": [asked.negative_prompt] * len(prompts)}
    with torch.no_grad():
        return flux.pipeline(list(prompts), height=flux.height, width=flux.width, num_inference_steps=STEPS, output_type=output_type,
                             generator=[torch.Generator().manual_seed(SEED + i) for i in range(len(prompts))],
                             max_sequence_length=flux.text_tokens, **options).images


def ours(flux, prompts):
    conditioning = flux.encode(prompts)
    return denoise(flux, flux.integrator(STEPS), flux.noise([SEED + i for i in range(len(prompts))]), conditioning)


@pytest.mark.parametrize("asked", [{}, {"height": 32, "width": 48}, {"text_tokens": 5}, {"guidance": 1.5},
                                   {"true_guidance": 2.0, "negative_prompt": "twemoji blue car"},
                                   {"true_guidance": 3.0, "negative_prompt": "noto", "width": 16, "guidance": 2.0}])
def test_latents_and_images_are_those_of_the_pipeline(flux, asked):
    model = flux.at(asked_of(flux, **asked))
    for prompts in (TWO[:1], TWO):
        latent = ours(model, prompts)
        torch.testing.assert_close(latent, theirs(model, prompts, "latent"), rtol=0, atol=2e-6)
        images = (theirs(model, prompts, "np") * 255).round().astype(int)
        assert np.abs(model.decode(latent).images.astype(int) - images).max() <= 1


def test_the_calls_are_the_pipelines_own_bit_for_bit(flux):
    """Without the family's faster forward, whose rounding differs."""
    model = flux.at(GenerationConfig(true_guidance=2.0, negative_prompt="noto", width=48))
    predictor = model.predictor(model.integrator(STEPS), model.encode(TWO[:1]))
    predictor._fast = None
    latent, stepper = model.integrator(STEPS).start(model.noise([SEED])).latent, model.integrator(STEPS).exact()
    with torch.no_grad():
        for step in range(STEPS):
            latent = stepper.step(predictor(latent, step), latent)
    assert torch.equal(latent, theirs(model, TWO[:1], "latent"))


def test_options_change_what_is_drawn_and_leave_the_model_as_it_was(flux):
    before = ours(flux, TWO[:1])
    guided = flux.at(GenerationConfig(true_guidance=4.0, negative_prompt="noto"))
    assert not torch.equal(ours(guided, TWO[:1]), before)
    wide = flux.at(GenerationConfig(width=64))
    assert wide.image_tokens == 2 * flux.image_tokens and wide.modules is flux.modules
    assert max(layer.tokens for layer in wide.layers) > max(layer.tokens for layer in flux.layers)
    assert [layer.calls for layer in guided.layers] == [2 * layer.calls for layer in flux.layers]
    assert torch.equal(ours(flux, TWO[:1]), before) and flux.at(GenerationConfig()) is flux


@pytest.mark.parametrize(("asked", "words"), [
    ({"width": 18}, "divisible by"), ({"frames": 5}, "frames: a FluxPipeline has none"), ({"guidance_2": 1.0}, "guidance 2"),
    ({"true_guidance": 2.0}, "need each other"), ({"negative_prompt": "noto"}, "need each other"), ({"text_tokens": 600}, "at most"),
])
def test_what_the_pipeline_does_not_take_is_refused_in_one_line(flux, asked, words):
    with pytest.raises(BadInput, match=words) as error:
        flux.at(GenerationConfig(**asked))
    assert "\n" not in str(error.value)


def test_schnell_has_no_guidance_and_reads_256_tokens_at_most():
    with pytest.raises(BadInput, match="guidance: a FluxPipeline has none"):
        bundle_of(guidance_embeds=False).at(GenerationConfig(guidance=3.5))


def test_a_trace_and_a_plan_belong_to_what_was_asked(flux):
    """A run cannot mix sizes, costs count the tokens of the size, and a plan says what it is for."""
    wide = flux.at(GenerationConfig(width=64))
    recorded = record(wide, TraceConfig(prompts=TWO, steps=STEPS))
    with pytest.raises(BadInput, match="recorded for width 64"):
        recorded.check_is_of(flux)
    quant = QuantConfig(modulation_bits=16, group_size=32)
    tables = [costs.tabulate(each, quant, STEPS) for each in (flux, wide)]
    assert int(tables[1].macs_L.sum()) > int(tables[0].macs_L.sum())
    plain, large = (plan_of(each, wide.integrator(STEPS), quant, 16, 16).model_copy(update={"generation": each.generation})
                    for each in (flux, wide))
    assert plain.plan_id != large.plan_id and BitPlan.parse(large.model_dump_json()).generation.width == 64
    quantized = build(wide, solve_bank(wide, Calibration(trace=recorded), quant, (16,)), large)
    made = denoise(quantized, recorded.integrator, wide.noise(recorded.seeds), recorded.conditioning)
    torch.testing.assert_close(made, recorded.latent_ST[:, -1], rtol=1e-4, atol=1e-5)
