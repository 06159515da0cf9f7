"""What layers read and give in a forward, kept call by call on a tree that is hooked for the purpose; the model's own stays untouched.

Letters: S samples, M tokens, K in features, N out features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from workbench.models import Bundle
from workbench.models.denoiser import Call
from workbench.models.tree import clone_tree
from workbench.types import LayerInfo

See = Callable[[LayerInfo, Tensor], None]  # layer, what it reads (..., K)


def watched(bundle: Bundle, layers: Iterable[LayerInfo], see: See) -> dict[str, nn.Module]:
    """Float trees whose forwards hand every input of these layers to `see`."""
    modules = {name: clone_tree(module) for name, module in bundle.modules.items()}
    for layer in layers:
        def hook(_module, args, layer=layer):
            see(layer, columns_of(layer, args[0]))
        modules[layer.module].get_submodule(layer.module_name).register_forward_pre_hook(hook)
    return modules


def columns_of(layer: LayerInfo, x: Tensor) -> Tensor:
    """The part of its module's input that a layer reads."""
    return x if layer.columns is None else x[..., slice(*layer.columns)]


class Taps:
    """Trees whose every layer keeps its inputs and has its outputs in the graph, call by call. One forward at a time.

    A call that holds every sample several times (`Call.rows`) counts as so many: `inputs_of` and `gradients_of` give (S, M, K) and
    (S, M, N) each, whatever axes the model itself uses."""

    def __init__(self, bundle: Bundle):
        self.modules: Mapping[str, nn.Module] = {name: clone_tree(module) for name, module in bundle.modules.items()}
        self._runs: dict[tuple[str, str], list[_Run]] = {}
        self._rows = 1
        for key in dict.fromkeys(map(_key, bundle.layers)):
            self.modules[key[0]].get_submodule(key[1]).register_forward_hook(self._keep(key))

    def begin(self, call: Call) -> None:
        """What follows belongs to this call."""
        self._rows = call.rows

    def clear(self) -> None:
        """Forget the last forward; its graph goes with it."""
        self._runs.clear()

    def outputs(self) -> list[Tensor]:
        """Every output of every call: what gradients are taken with respect to."""
        return [run.output for runs in self._runs.values() for run in runs]

    def gradients(self, found: Sequence[Tensor]) -> dict[tuple[str, str], list[Tensor]]:
        """Gradients in the order of `outputs`, by module."""
        rest = iter(found)
        return {key: [next(rest) for _ in runs] for key, runs in self._runs.items()}

    def inputs_of(self, layer: LayerInfo) -> list[Tensor]:
        """What a layer read, (S, M, K) call by call; empty where it did not run."""
        return [each for run in self._runs.get(_key(layer), ()) for each in by_sample(columns_of(layer, run.input), run.rows)]

    def gradients_of(self, layer: LayerInfo, gradients: Mapping[tuple[str, str], list[Tensor]]) -> list[Tensor]:
        """The part of `gradients` that belongs to a layer's outputs, (S, M, N) call by call."""
        found = []
        for run, g in zip(self._runs.get(_key(layer), ()), gradients.get(_key(layer), ())):
            found += by_sample(g if layer.rows is None else g[..., slice(*layer.rows)], run.rows)
        return found

    def _keep(self, key: tuple[str, str]):
        def hook(_module, args, output):
            if not output.requires_grad:  # a text stream that no latent has touched yet
                output = output.detach().requires_grad_()
            self._runs.setdefault(key, []).append(_Run(args[0].detach(), output, self._rows))
            return output
        return hook


@dataclass(frozen=True)
class _Run:
    """One run of a module in a forward whose call holds every sample `rows` times."""

    input: Tensor
    output: Tensor
    rows: int


def by_sample(x: Tensor, rows: int) -> list[Tensor]:
    """(rows S, ..., Z) as `rows` tensors (S, M, Z), the axes between taken as tokens."""
    x = x.unsqueeze(1) if x.ndim == 2 else x.flatten(1, -2)
    return list(x.chunk(rows))


def _key(layer: LayerInfo) -> tuple[str, str]:
    return layer.module, layer.module_name
