"""Other libraries are timed as they are, left out with a reason where they cannot be, and leave the bundle alone."""

import importlib.metadata

import pytest
import torch

from workbench import baselines, bench, latency
from workbench.baselines import BASELINES, Baseline

STEPS = 2


@pytest.fixture
def install(monkeypatch):
    """Makes one library the only one, installed in version 1.2 unless told otherwise."""
    def only(baseline: Baseline, *, version: str | None = "1.2") -> None:
        def look_up(distribution: str) -> str:
            if distribution != "a-library" or version is None:
                raise importlib.metadata.PackageNotFoundError(distribution)
            return version
        monkeypatch.setattr(baselines, "BASELINES", {"a-library": baseline})
        monkeypatch.setattr(baselines.importlib.metadata, "version", look_up)
    return only


@pytest.fixture(autouse=True)
def unchanged(bundle):
    """Holds the bundle against what it was before the test."""
    def state():
        modules = [bundle.linear(layer) for layer in bundle.layers]
        return bundle.transformer, bundle.dtype, modules, len(bundle.transformer._forward_pre_hooks)
    before, weights = state(), [parameter.clone() for parameter in bundle.transformer.parameters()]
    yield
    assert state() == before
    assert all(torch.equal(parameter, weight) for parameter, weight in zip(bundle.transformer.parameters(), weights))


def leave(_model):
    """A quantizer that leaves the model as it is."""


def fail(_model):
    raise RuntimeError("\nno kernel for this shape\nat line 7")


def test_a_missing_library_is_a_row_without_a_time(bundle, install):
    install(Baseline("a library", baselines._in_place(fail)), version=None)
    entries, runs = baselines.prepare(bundle, STEPS)
    assert runs == {}
    assert baselines.with_times(entries, {}) == [
        {"name": "a library", "version": None, "model_ms": None, "bytes": None, "reason": "not installed"}]


def test_a_library_that_fails_is_a_row_with_the_first_line_of_its_error(bundle, install):
    install(Baseline("a library", baselines._in_place(fail)))
    entries, runs = baselines.prepare(bundle, STEPS)
    assert runs == {}
    assert baselines.with_times(entries, {}) == [
        {"name": "a library", "version": "1.2", "model_ms": None, "bytes": None, "reason": "no kernel for this shape"}]


def test_an_error_without_words_is_named(bundle, install):
    def made(*_):
        raise NotImplementedError
    install(Baseline("a library", made))
    assert baselines.prepare(bundle, STEPS)[0][0]["reason"] == "NotImplementedError"


def test_a_model_that_fails_only_when_it_runs_leaves_the_bundle_alone(bundle, install):
    def spoil(model):
        model.x_embedder = torch.nn.Identity()
    install(Baseline("a library", baselines._in_place(spoil)))
    entries, runs = baselines.prepare(bundle, STEPS)
    assert runs == {} and entries[0]["reason"]


def test_a_working_library_is_timed_in_each_float_type_and_the_faster_one_counts(bundle, install):
    seen = []
    install(Baseline("a library", baselines._in_place(lambda model: seen.append(model))))
    entries, runs = baselines.prepare(bundle, STEPS)
    assert list(runs) == [("a library", str(dtype)) for dtype in bench.FLOAT_TYPES]
    assert [next(model.parameters()).dtype for model in seen] == list(bench.FLOAT_TYPES)
    assert all(model is not bundle.transformer for model in seen)
    us = latency.interleaved_timing(runs, 1, bundle.device)
    (entry,) = baselines.with_times(entries, us)
    assert entry["model_ms"] == min(us.values()) / 1000 > 0 and entry["version"] == "1.2" and "reason" not in entry
    assert baselines.with_times(entries, dict(zip(runs, (3000.0, 2000.0))))[0]["model_ms"] == 2.0


def test_a_library_may_name_its_own_float_types(bundle, install):
    install(Baseline("a library", baselines._in_place(leave), (torch.float32,)))
    entries, runs = baselines.prepare(bundle, STEPS)
    assert list(runs) == [("a library", "torch.float32")]
    model = bundle.transformer
    assert entries[0]["bytes"] == sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


class Packed(torch.Tensor):
    """Looks like float32; is made of int8 codes and a scale, which may be packed again."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError


def test_bytes_of_a_quantized_tensor_are_those_of_its_inner_tensors():
    codes, scale = torch.zeros(6, 10, dtype=torch.int8), torch.ones(6)
    assert baselines.tensor_bytes(codes) == 60 and baselines.tensor_bytes(scale.bfloat16()) == 12
    assert baselines.tensor_bytes(Packed(codes, scale)) == 60 + 24
    assert baselines.tensor_bytes(Packed(codes, Packed(torch.zeros(6, dtype=torch.int8), torch.ones(1)))) == 60 + 6 + 4


def test_onnx_runtime_refuses_what_it_cannot_do(bundle, monkeypatch):
    make = BASELINES["onnxruntime"].make
    assert BASELINES["onnxruntime"].float_types == (torch.float32,)
    with pytest.raises(ValueError, match="float32"):
        make(bundle, STEPS, torch.bfloat16)
    monkeypatch.setattr(bundle, "parameters", 12_000_000_000)
    with pytest.raises(ValueError, match=r"12\.0e9 parameters"):
        make(bundle, STEPS, torch.float32)


@pytest.mark.slow
def test_onnx_runtime_computes_the_same_transformer_in_8_bits(bundle, monkeypatch):
    for module in ("onnxruntime", "onnx", "onnxscript"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    made = []
    monkeypatch.setattr(bench, "generation", _kept(bench.generation, made))
    monkeypatch.setattr(baselines, "BASELINES", {"onnxruntime": BASELINES["onnxruntime"]})
    (entry,), runs = baselines.prepare(bundle, STEPS)
    assert "reason" not in entry and list(runs) == [(entry["name"], "torch.float32")]
    assert 1.0 < entry["bytes"] / bundle.parameters < 1.3, "one byte per weight and little else"
    integrator, conditioning, latent = bundle.integrator(STEPS), bundle.encode(bundle.prompts("showcase")[:1]), bundle.noise([0])
    with torch.no_grad():
        wanted, found = (model.predictor(integrator, conditioning)(latent, 1) for model in (bundle, made[0]))
    assert 0 < (found - wanted).norm() / wanted.norm() < 0.1


def _kept(generation, made: list):
    """`generation` that also keeps the model it is given."""
    def kept(bundle, steps, model):
        made.append(model)
        return generation(bundle, steps, model)
    return kept
