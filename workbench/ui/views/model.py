"""Screen 1: what a model is, before and after it is loaded."""

from __future__ import annotations

import json
from html import escape

from workbench import model_info
from workbench.ui.tables import megabytes, numbers, pick, table
from workbench.ui.widget import served


def model_cards(loaded: str) -> str:
    """Every embedded model with pictures of what it draws; a card loads it."""
    cards = []
    for name, folder in model_info.embedded().items():
        found, grid = model_info.of(name), folder / "grid.png"
        picture = f'<img src="{escape(served(grid))}" alt="{escape(_drawn(folder))}" loading="lazy">' if grid.exists() else ""
        cards.append(
            f'<button type="button" class="model-card" {pick({"model": name}, tag="button")} aria-pressed="{str(name == loaded).lower()}">'
            f"{picture}<span><b>{escape(name)}</b> {escape(found.family)}, {found.parameters / 1e6:.1f} M parameters, "
            f"{megabytes(found.disk_bytes)} MB on disk{' · loaded' if name == loaded else ''}</span></button>"
        )
    return f'<div class="model-cards" role="group" aria-label="embedded models">{"".join(cards)}</div>'


def _drawn(folder) -> str:
    """What is in a model's grid of pictures, for those who do not see it."""
    try:
        names = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["grid"]
        return "drawn by the model: " + ", ".join(map(str, names[:12])) + " and others"
    except (OSError, ValueError, KeyError, TypeError):
        return "pictures drawn by the model"


def model_info_numbers(found) -> str:
    """Size, layers and memory of a model that is not loaded yet."""
    if found is None:
        return ""
    if found.parameters is None:
        return numbers([("kind", found.kind, "", ""), ("size", "unknown", "", found.note)], found.source)
    free = model_info.free_bytes()
    rows = [
        ("kind", f"{found.kind}, {found.family}", "", ""),
        ("parameters of the transformer", f"{found.parameters:,}", "", "exact"),
        ("weight matrices", found.linears, f"in {found.blocks} blocks", "exact"),
        ("on disk", megabytes(found.disk_bytes), "MB", "exact"),
        ("memory to load", f"{found.load_bytes / 1e9:.2f}", "GB, float32", "modelled"),
        ("memory to profile and search", f"{found.search_bytes / 1e9:.2f}", "GB, activations aside", "modelled"),
    ]
    if free is not None:
        rows.append(("memory that is free", f"{free / 1e9:.1f}", "GB", "measured"))
    return numbers(rows, f"{found.source}, not loaded yet")


def model_summary(bundle) -> str:
    blocks = {layer.block for layer in bundle.layers}
    quantizable = sum(layer.n_out * layer.k_in for layer in bundle.layers if layer.has_act_bits)
    modulation = [layer for layer in bundle.layers if not layer.has_act_bits]
    macs = sum(layer.macs_per_step for layer in bundle.layers)
    rows = [
        ("parameters of the transformer", f"{bundle.parameters:,}", "", "exact"),
        ("of these in quantizable layers", f"{quantizable:,}", "", "exact"),
        ("float size", megabytes(bundle.float_bytes), "MB, 2 bytes a parameter", "exact"),
        ("quantizable linear layers", len(bundle.layers) - len(modulation), f"in {len(blocks)} blocks", "exact"),
        ("modulation layers (weight only)", len(modulation), "layers", "exact"),
        ("multiply-accumulates of one step", f"{macs / 1e6:,.1f}", "million MACs", "exact"),
        ("float reference", bundle.float_type, "", ""),
    ]
    return numbers(rows, f"{bundle.name}, loaded")


def protected(bundle) -> str:
    return table(("layer kept in float", "reason"), bundle.protected.items(), "Protected") if bundle.protected else ""
