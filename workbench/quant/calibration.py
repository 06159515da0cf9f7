"""What a replay of the float trace tells about the layers' inputs: Hessians, transforms, static ranges, SSC weights.

Dimension letters as in `types.py`: T steps, L layers, S samples, M tokens, N out features, K in features.

Layers that read one tensor form an input group and share a Hessian and a range; a group is known by the index of its first layer.
Siblings in one block (`LayerInfo.fused_with`) share a transform, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from workbench.models import Bundle
from workbench.options import OnProgress, Progress, QuantConfig, ignore_progress
from workbench.plans import BitChoice
from workbench.quant import activations, grids, smoothing, transforms
from workbench.quant.solvers import HessianSum
from workbench.quant.transforms import Transform
from workbench.replay.taps import watched
from workbench.replay.trace import Trace, memory_batches
from workbench.types import LayerInfo

See = Callable[[LayerInfo, int, Tensor], None]  # first layer of a group, step, input (..., K)

_TOKENS = 4096  # replayed at a time
_HESSIAN_BYTES = 4 << 30  # Hessians held at a time; a larger model is replayed once per part
_ROWS_KEPT = 512  # calibration rows of an input that judge a smoothing vector
REFERENCE_BITS = 4  # width that shared parts (smoothing, branch) are searched for, where several are solved


class Count:
    """Steps done of a known total, reported to the listener."""

    def __init__(self, on_progress: OnProgress, stage: str, total: int):
        self._on_progress, self._stage, self._total, self._done = on_progress, stage, total, 0

    def step(self, message: str) -> None:
        self._done += 1
        self._on_progress(Progress(stage=self._stage, done=self._done, total=self._total, message=message))


def input_groups(layers: Sequence[LayerInfo]) -> list[list[LayerInfo]]:
    """Layers that read the same tensor, together, wherever they stand."""
    return _grouped(layers, "same_input")


def fused_groups(layers: Sequence[LayerInfo]) -> list[list[LayerInfo]]:
    """Siblings that run in one pass, together."""
    return _grouped(layers, "fused_with")


def _grouped(layers: Sequence[LayerInfo], relation: str) -> list[list[LayerInfo]]:
    found: dict[int, list[LayerInfo]] = {}
    for layer in layers:
        found.setdefault(getattr(layer, relation), []).append(layer)
    return list(found.values())


def parts(groups: list[list[LayerInfo]]) -> list[list[list[LayerInfo]]]:
    """Groups split into runs whose Hessians fit in memory together."""
    found: list[list[list[LayerInfo]]] = []
    room_bytes = 0
    for group in groups:
        need_bytes = 4 * group[0].k_in ** 2
        if not found or need_bytes > room_bytes:
            found.append([])
            room_bytes = _HESSIAN_BYTES
        found[-1].append(group)
        room_bytes -= need_bytes
    return found


def reference_bits(widths: Sequence[int]) -> int:
    """The width that what all widths share is searched for: the only one, or a typical one."""
    narrow = {bits for bits in widths if bits != 16}
    return narrow.pop() if len(narrow) == 1 else REFERENCE_BITS


@torch.no_grad()
def replay(bundle: Bundle, trace: Trace, groups: list[list[LayerInfo]], see: See, count: Count) -> None:
    """Run the float model along the trace; `see` gets every group's input at every step, call by call."""
    trace.check_is_of(bundle)
    now = [0]
    modules = watched(bundle, [group[0] for group in groups], lambda first, x: see(first, now[0], x))
    for batch in trace.batches(tokens=_TOKENS, device=bundle.device):
        predict = bundle.predictor(trace.integrator, batch.conditioning, modules=modules)
        for t in range(trace.steps):
            now[0] = t
            predict(trace.latent_ST[batch.rows, t].to(bundle.device), t)
            count.step(f"replayed step {t + 1} of {trace.steps}")


def replayed_steps(trace: Trace) -> int:
    """How many reports a replay makes."""
    return trace.steps * len(memory_batches(trace.samples, trace.tokens, limit=_TOKENS))


def hessians(bundle: Bundle, trace: Trace, alpha_TL: Tensor, groups: list[list[LayerInfo]], count: Count) -> dict[int, HessianSum]:
    """H' = sum alpha_tl x x^T of each group's input; a group is weighted by the mean of its layers' alpha."""
    sums = {group[0].index: HessianSum(group[0].k_in, bundle.device) for group in groups}
    members = {group[0].index: [layer.index for layer in group] for group in groups}
    replay(bundle, trace, groups,
           lambda first, t, x: sums[first.index].update(x, float(alpha_TL[t, members[first.index]].mean())), count)
    return sums


def transform_of(layer: LayerInfo, quant: QuantConfig, smooth_K: Tensor | None = None) -> Transform:
    """The transform of a layer's input; none where activations stay float."""
    if not layer.has_act_bits:
        return transforms.make("none", layer.k_in, 0)
    return transforms.make(quant.transform, layer.k_in, quant.seed, smooth_K)


def fit_transforms(bundle: Bundle, trace: Trace, quant: QuantConfig, reference_bits: int, *,
                   on_progress: OnProgress = ignore_progress) -> dict[str, Transform]:
    """The transform of every layer's input, by layer name. Only smoothing needs a replay, and if it is searched, the width that it is
    searched for."""
    if not quant.transform.startswith("smooth"):
        return {layer.name: transform_of(layer, quant) for layer in bundle.layers}
    found = {layer.name: transform_of(layer, quant) for layer in bundle.layers if not layer.has_act_bits}
    split = parts(input_groups([layer for layer in bundle.layers if layer.has_act_bits]))
    count = Count(on_progress, "smoothing", len(split) * replayed_steps(trace))
    for part in split:
        seen = {group[0].index: _Rows(group[0].k_in, trace, group[0].tokens * group[0].calls) for group in part}
        replay(bundle, trace, part, lambda first, _t, x, seen=seen: seen[first.index].update(x), count)
        for group in part:
            rows = seen.pop(group[0].index)
            for siblings in fused_groups(group):
                made = _smooth(bundle, siblings, rows, quant, reference_bits)
                found |= {layer.name: made for layer in siblings}
    return found


class _Rows:
    """The largest magnitude of each feature, and rows spread evenly over steps, samples and tokens."""

    def __init__(self, k_in: int, trace: Trace, tokens: int):
        self.absmax_K: Tensor | float = 0.0
        self._kept: list[Tensor] = []
        self._stride = max(1, trace.steps * trace.samples * tokens // _ROWS_KEPT)
        self._k_in, self._next = k_in, 0

    def update(self, x: Tensor) -> None:
        x_MK = x.reshape(-1, self._k_in).float()
        absmax_K = x_MK.abs().amax(0)
        self.absmax_K = torch.maximum(absmax_K, torch.as_tensor(self.absmax_K, device=x.device))
        self._kept.append(x_MK[self._next :: self._stride].clone())
        self._next = (self._next - len(x_MK)) % self._stride

    def rows(self) -> Tensor:
        """x_MK float32."""
        return torch.cat(self._kept)


def _smooth(bundle: Bundle, group: list[LayerInfo], seen: _Rows, quant: QuantConfig, bits: int) -> Transform:
    w_NK = torch.cat([bundle.weight(layer).detach().float() for layer in group])

    def transform_of(smooth_K: Tensor) -> Transform:
        return transforms.make(quant.transform, group[0].k_in, quant.seed, smooth_K)

    if quant.smoothing == "fixed":
        return transform_of(smoothing.vector(seen.absmax_K, w_NK.abs().amax(0), quant.smooth_alpha, 1 - quant.smooth_alpha))
    choice = BitChoice.of(bits, quant)
    # a static range is not known yet; the search judges by what a token's own range would do
    act_format = activations.format_of(quant.model_copy(update={"act_scale": "token"}) if quant.act_scale == "tensor" else quant,
                                       quant.group_size)
    smooth_K, _ = smoothing.search(
        seen.rows(), w_NK, seen.absmax_K, transform_of=transform_of,
        round_input=lambda x: activations.fake_quantize(x, bits, act_format),
        round_weight=lambda w: grids.rounded(w, choice))
    return transform_of(smooth_K)


def static_ranges(bundle: Bundle, trace: Trace, fitted: Mapping[str, Transform], *,
                  on_progress: OnProgress = ignore_progress) -> dict[str, Tensor]:
    """range_2 (smallest, largest) float16 of every layer's transformed input over the whole trace, by layer name."""
    layers, low, high = [layer for layer in bundle.layers if layer.has_act_bits], {}, {}
    groups = input_groups(layers)
    members = {group[0].index: fused_groups(group) for group in groups}

    def see(first: LayerInfo, _t: int, x: Tensor) -> None:
        for siblings in members[first.index]:
            y = fitted[siblings[0].name].forward(x)
            at = siblings[0].index
            low[at], high[at] = min(low.get(at, 0.0), float(y.min())), max(high.get(at, 0.0), float(y.max()))

    replay(bundle, trace, groups, see, Count(on_progress, "ranges", replayed_steps(trace)))
    return {layer.name: torch.tensor([low[layer.fused_with], high[layer.fused_with]], device=bundle.device).clamp(-65504, 65504).half()
            for layer in layers}


def spearman_weights(bundle: Bundle, trace: Trace, *, on_progress: OnProgress = ignore_progress) -> Tensor:
    """alpha_TL of PTQ4DiT's calibration (arXiv 2405.16005): eta = softmax_t(-rho_t) times T, with rho_t the Spearman correlation
    over features of max|X_t| and max|W|. Steps whose salient activations meet plain weights count more."""
    steps, groups = trace.steps, input_groups(bundle.layers)
    absmax_TK = {group[0].index: torch.zeros(steps, group[0].k_in, device=bundle.device) for group in groups}

    def see(first: LayerInfo, t: int, x: Tensor) -> None:
        row_K = absmax_TK[first.index][t]
        torch.maximum(row_K, x.reshape(-1, first.k_in).float().abs().amax(0), out=row_K)

    replay(bundle, trace, groups, see, Count(on_progress, "spearman", replayed_steps(trace)))
    alpha_TL = torch.ones(steps, len(bundle.layers))
    for group in groups:
        w_absmax_K = torch.cat([bundle.weight(layer).detach().float() for layer in group]).abs().amax(0)
        rho_T = torch.tensor([_spearman(row_K, w_absmax_K) for row_K in absmax_TK[group[0].index]])
        alpha_TL[:, [layer.index for layer in group]] = (steps * torch.softmax(-rho_T, 0))[:, None].float()
    return alpha_TL


def _spearman(first_K: Tensor, second_K: Tensor) -> float:
    """Rank correlation; 0 where one of the two does not vary."""
    from scipy.stats import spearmanr

    if len(first_K) < 2 or bool((first_K == first_K[0]).all()) or bool((second_K == second_K[0]).all()):
        return 0.0
    return float(spearmanr(first_K.cpu().numpy(), second_K.cpu().numpy()).statistic)
