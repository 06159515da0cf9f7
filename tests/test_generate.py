"""Float and quantized generation: same noise, same batches, honest clocks, and a cancel that leaves nothing behind."""

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lowbit.ops import Backend

from tests.quant.toy import straight
from workbench import generate, metrics
from workbench.models.media import Media
from workbench.options import ACT_BITS, BadInput, Cancelled
from workbench.plans import BitChoice, BitPlan
from workbench.types import Conditioning

STEPS = 4
ENCODING_SECONDS = 0.2


def _plan():
    return BitPlan(model_hash="0123456789abcdef", layer_names=("a",), sigma_T=(1.0,), weight_choice_L=(BitChoice(weight_bits=4),),
                   act_bits_TL=((ACT_BITS[1],),), weight_bytes=5, act_bits_mean=4, act_bits_macs=4, bit_ops=1)


class LinearFlow:
    """A model whose output is known: v = shift + x * 0, so x_0 = noise - shift, and `shift` is what quantization disturbs."""

    device, float_bytes, tokens, shift = torch.device("cpu"), 40, 3, 1.0

    def __init__(self):
        self.batches = []

    def integrator(self, steps):
        return straight(steps)

    def encode(self, prompts):
        time.sleep(ENCODING_SECONDS)  # must not be counted as transformer time
        return Conditioning(per_sample={"length": torch.tensor([float(len(p)) for p in prompts])}, shared={})

    def noise(self, seeds):
        return torch.stack([torch.randn(3, 2, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    def predictor(self, integrator, conditioning, shift=None):
        shift = self.shift if shift is None else shift

        def predict(latent, step):
            assert not torch.is_grad_enabled()
            self.batches.append(len(latent))
            return torch.zeros_like(latent) + shift + conditioning.per_sample["length"][:, None, None]
        return predict

    def decode(self, latent):
        grey = (latent.mean((1, 2)) * 8 + 128).clamp(0, 255).round()
        return Media.of_images(grey.numpy().astype(np.uint8)[:, None, None, None] * np.ones((1, 16, 16, 3), np.uint8))


class Disturbed(SimpleNamespace):
    """A quantized model of `flow` that adds `error` to its output."""

    plan, weight_bytes = _plan(), 5

    def compute(self, bundle):
        return Backend("emulated", "why")

    def predictor(self, integrator, conditioning):
        return self.flow.predictor(integrator, conditioning, self.flow.shift + self.error)


def test_latents_follow_the_flow_and_seeds_give_the_noise():
    flow = LinearFlow()
    made = generate.run(flow, ["ab", "c"], [7, 8], flow.integrator(STEPS))
    noise = flow.noise([7, 8])
    assert torch.equal(made.latent_ST[:, 0], noise)
    expected = noise - torch.tensor([3.0, 2.0])[:, None, None]
    assert torch.allclose(made.latent_ST[:, -1], expected, atol=1e-6)
    assert made.latent_ST.shape == (2, STEPS + 1, 3, 2) and made.images.shape == (2, 16, 16, 3)


def test_both_models_see_the_same_batches_of_at_most_eight():
    flow = LinearFlow()
    generate.compare(flow, Disturbed(flow=flow, error=0.1), [f"p{i}" for i in range(19)], 0, STEPS)
    half = [1] + [6] * STEPS + [6] * STEPS + [7] * STEPS  # the warm-up call, then three batches, as even as can be
    assert flow.batches == half + half


def test_seconds_are_of_transformer_calls_alone():
    flow = LinearFlow()
    made = generate.run(flow, ["a"], [0], flow.integrator(STEPS))
    assert 0 < made.seconds_per_image < ENCODING_SECONDS


def test_the_first_call_is_not_timed():
    class SlowStart(LinearFlow):
        def predictor(self, *args):
            predict = super().predictor(*args)

            def slow(latent, step):
                if not self.batches:
                    time.sleep(ENCODING_SECONDS)
                return predict(latent, step)
            return slow

    flow = SlowStart()
    assert generate.run(flow, ["a"], [0], flow.integrator(STEPS)).seconds_per_image < ENCODING_SECONDS


def test_errors_are_measured_step_by_step():
    flow, error = LinearFlow(), 0.3
    compared = generate.compare(flow, Disturbed(flow=flow, error=error), ["a", "b"], 5, STEPS)
    reference = generate.run(flow, ["a", "b"], [5, 6], flow.integrator(STEPS))
    for index, pair in enumerate(compared.pairs):
        assert (pair.prompt, pair.seed) == ("ab"[index], 5 + index)
        for step in range(STEPS):
            reference_MD = reference.latent_ST[index, step + 1]
            off = error * (step + 1) / STEPS  # each step of length 1/T adds its share of the constant disturbance
            expected = off**2 * reference_MD.numel() / float(reference_MD.square().sum())
            assert pair.latent_nmse_T[step] == pytest.approx(expected, rel=1e-4)
        assert pair.latent_nmse == pair.latent_nmse_T[-1]
        assert pair.psnr_db == metrics.psnr_db(pair.image_quantized, pair.image_float) < 60
    found = compared.metrics["latent_nmse"]
    assert found.mean == pytest.approx(np.mean([p.latent_nmse for p in compared.pairs])) and found.n == 2
    assert (compared.float_bytes, compared.quantized_bytes, compared.compute, compared.reason) == (40, 5, "emulated", "why")


def test_an_undisturbed_model_reproduces_the_float_images():
    flow = LinearFlow()
    compared = generate.compare(flow, Disturbed(flow=flow, error=0.0), ["a", "b", "c"], 0, STEPS)
    assert all(pair.psnr_db == metrics.PSNR_CEILING_DB and pair.latent_nmse == 0 for pair in compared.pairs)
    assert compared.metrics["ssim"].mean == pytest.approx(1.0)


def test_a_float_run_is_reused_and_must_match():
    flow = LinearFlow()
    prompts, seeds = ("a", "b"), (3, 4)
    float_run = generate.run(flow, prompts, seeds, flow.integrator(STEPS))
    flow.batches.clear()
    again = generate.compare(flow, Disturbed(flow=flow, error=0.3), prompts, 3, STEPS, float_run=float_run)
    assert flow.batches == [1] + [2] * STEPS
    fresh = generate.compare(flow, Disturbed(flow=flow, error=0.3), prompts, 3, STEPS)
    assert [p.latent_nmse_T for p in again.pairs] == [p.latent_nmse_T for p in fresh.pairs]
    for other in (dict(seed=4, steps=STEPS), dict(seed=3, steps=STEPS + 1)):
        with pytest.raises(ValueError, match="other prompts, seeds or steps"):
            generate.compare(flow, Disturbed(flow=flow, error=0.3), prompts, **other, float_run=float_run)


def test_progress_covers_every_step_and_ends_at_the_total():
    seen = []
    flow = LinearFlow()
    generate.run(flow, ["a"] * 9, range(9), flow.integrator(STEPS), on_progress=seen.append)
    done = [p.done for p in seen]
    assert done == sorted(done) and set(done) == set(range(2 * STEPS + 1)) and {p.total for p in seen} == {2 * STEPS}


def test_what_a_batch_has_finished_is_shown_small_and_only_if_asked_for():
    flow, seen = LinearFlow(), []
    compared = generate.compare(flow, Disturbed(flow=flow, error=0.3), ["a"] * 9, 0, STEPS, drafts=True, on_progress=seen.append)
    shown = [(p.stage, p.done, p.detail.first, len(p.detail.thumbnails)) for p in seen if p.detail is not None]
    assert shown == [(f"generate {side}", *batch) for side in ("float", "quantized") for batch in ((STEPS, 0, 4), (2 * STEPS, 4, 5))]
    last = [p.detail for p in seen if p.detail is not None][-1]
    assert (last.thumbnails[4] == compared.pairs[8].image_quantized).all(), "small enough already"
    large = np.zeros((300, 600, 3), np.uint8)
    assert generate._thumbnail(large).shape == (64, 128, 3)
    seen.clear()
    generate.compare(flow, Disturbed(flow=flow, error=0.3), ["a"], 0, STEPS, on_progress=seen.append)
    assert all(p.detail is None for p in seen)


def test_cancel_within_a_step_runs_no_further_step():
    flow = LinearFlow()

    def stop(progress):
        if progress.stage == "generate quantized" and progress.done == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        generate.compare(flow, Disturbed(flow=flow, error=0.3), ["a"], 0, STEPS, on_progress=stop)
    assert len(flow.batches) == (1 + STEPS) + (1 + 2)


def test_a_step_shows_the_final_latent_that_the_model_predicts_there():
    flow = LinearFlow()
    compared = generate.compare(flow, Disturbed(flow=flow, error=0.3), ["ab"], 7, STEPS)
    for step in range(STEPS):  # a constant output is right about the end at every step
        for image, shift in zip(generate.preview(flow, compared.trajectories, 0, step), (3.0, 3.3), strict=True):
            assert (image == flow.decode(flow.noise([7]) - shift).images[0]).all()
    first, second = generate.preview(flow, compared.trajectories, 0, STEPS - 1)
    assert (first == compared.pairs[0].image_float).all() and (second == compared.pairs[0].image_quantized).all()


def test_metrics_of_a_video_are_means_over_its_frames():
    rng = np.random.default_rng(0)
    reference = rng.integers(0, 255, (1, 3, 32, 32, 3), np.uint8)
    frames = reference.copy()
    frames[0, 1] = np.clip(reference[0, 1].astype(int) + 9, 0, 255)
    latents = torch.zeros(1, 2, 4)
    float_run, quantized_run = (generate.Generated(prompts=("a",), seeds=(0,), latent_ST=latents + 1, clean_ST=latents,
                                                   media=Media(frames=each), seconds_per_image=1.0) for each in (reference, frames))
    pair = generate._pair(0, float_run, quantized_run)
    expected = [metrics.psnr_db(a, b) for a, b in zip(frames[0], reference[0])]
    assert pair.psnr_db == pytest.approx(np.mean(expected)) and expected[0] != expected[1]
    assert pair.frames_quantized.shape == (3, 32, 32, 3) and (pair.image_float == reference[0, 0]).all()


@pytest.mark.parametrize("prompts, seed, steps, message", [
    ([], 0, 4, "no prompt"), (["a", " "], 0, 4, "prompt 2 is empty"), (["a" * 5001], 0, 4, "5001 characters"),
    (["a"], -1, 4, "seed"), (["a"], 0, 0, "steps"), (["a"], 0, 101, "steps"), (["a"] * 257, 0, 4, "256"),
])
def test_bad_input_is_refused_before_anything_runs(prompts, seed, steps, message):
    flow = LinearFlow()
    with pytest.raises(BadInput, match=message) as error:
        generate.compare(flow, Disturbed(flow=flow, error=0.3), prompts, seed, steps)
    assert "\n" not in str(error.value) and flow.batches == []
