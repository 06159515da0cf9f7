"""Screen 5: what can be taken away."""

from __future__ import annotations

from html import escape

from workbench import csvtable
from workbench.ui import budgets
from workbench.ui.tables import table
from workbench.ui.views.layers import layer_labels


def files(folder, paths) -> str:
    """Files of an exported folder with their sizes."""
    rows = [(path.relative_to(folder).as_posix(), f"{path.stat().st_size / 1000:,.1f}", "kB") for path in paths]
    total = sum(path.stat().st_size for path in paths)
    return table(("file", "size", ""), [*rows, ("total", f"{total / 1000:,.1f}", "kB")], f"Checkpoint folder {folder}")


def downloads(rows, has_plan: bool) -> str:
    """Everything that can be taken away; what does not exist yet says so."""
    items = []
    for name, what, path in rows:
        ident = name.split()[0].lower()
        if path is not None and path.exists():
            head = (
                f'<a id="{ident}-download" href="/gradio_api/file={escape(str(path))}" download="{escape(path.name)}">{escape(name)}</a>'
                f" <small>{path.stat().st_size / 1000:,.0f} kB</small>"
            )
        else:
            head = f'<b id="{ident}-download">{escape(name)}</b> <small>not yet</small>'
        items.append(f"<li>{head}<span>{escape(what)}</span></li>")
    note = "" if has_plan else '<p class="notice plain">A search, a link or a file gives you a plan to take away.</p>'
    return f'<ul class="downloads">{"".join(items)}</ul>{note}'


def link(code: str, with_prompts: bool) -> str:
    """The link that restores model, plan and, where they fit, prompts, with a button that copies its whole address."""
    if not code:
        return ""
    address = escape(f"?plan={code}")
    what = "model, prompts and plan" if with_prompts else "model and plan; these prompts are too many for a link, send them as a file"
    says = f"A link that restores {what} ({len(code):,} characters; it holds no images and no weights)"
    return (
        f'<div class="link"><span>{says}</span><button type="button" class="copy" data-copy="{address}">Copy link</button>'
        f'<a href="{address}" target="_blank" rel="noopener">open in a new tab</a></div>'
    )


def plan_csv(plan, layers) -> str:
    """A row per layer: its stored width and its activation width at every step."""
    head = ["layer", "block", "weight bits", *(f"activation bits, step {t}" for t in range(len(plan.sigma_T)))]
    return csvtable.write(
        head, ([layer.name, layer.block, plan.weight_bits_L[i], *(row[i] for row in plan.act_bits_TL)] for i, layer in enumerate(layers))
    )


def sensitivity_csv(found, layers) -> str:
    """A row per step and layer with everything that the map can show."""
    smap, table_ = found.sensitivity, found.table
    widths = list(enumerate(table_.act_bits_C))
    head = [
        "step",
        "sigma",
        "layer",
        "fisher",
        "standard error",
        "alpha",
        "largest |activation|",
        *(f"predicted error at {b} bits" for _, b in widths),
    ]
    rows = [
        [
            t,
            float(smap.sigma_T1[t]),
            layer.name,
            *(None if x is None else float(x[t, i]) for x in (smap.fisher_TL, smap.stderr_TL, smap.alpha_TL, smap.act_absmax_TL)),
            *(float(table_.error_TLC[t, i, c]) for c, _ in widths),
        ]
        for t in range(smap.steps)
        for i, layer in enumerate(layers)
    ]
    return csvtable.write(head, rows)


def front_csv(result) -> str:
    """Every measured plan of the search."""
    axes = [axis for axis in budgets.AXES if any(axis.shown(s.plan) is not None for s in result.front)]
    head = [
        "list",
        "origin",
        "plan",
        *(f"{axis.label}, {axis.unit}" for axis in axes),
        "error (NMSE)",
        "prompts",
        "held out",
        "predicted error",
    ]
    return csvtable.write(
        head,
        (
            [
                kind,
                s.origin,
                s.plan.plan_id,
                *(axis.shown(s.plan) for axis in axes),
                s.error,
                s.samples,
                s.held_out,
                s.plan.predicted_error,
            ]
            for kind, plans in (("front", result.front), ("reference", result.references))
            for s in plans
        ),
    )


def comparison_csv(comparison) -> str:
    """A row per prompt."""
    steps = len(comparison.pairs[0].latent_nmse_T)
    head = ["prompt", "seed", "PSNR dB", "SSIM", "VIF", "LPIPS", "latent NMSE", *(f"latent NMSE after step {t}" for t in range(steps))]
    return csvtable.write(head, ([p.prompt, p.seed, p.psnr_db, p.ssim, p.vif, p.lpips, p.latent_nmse, *p.latent_nmse_T]
                                 for p in comparison.pairs))


def tables(session) -> dict[str, str]:
    """All there is as CSV files, by name."""
    made = {}
    if session.chosen is not None:
        made["plan.csv"] = plan_csv(session.chosen.plan, session.bundle.layers)
    if session.profile is not None:
        made["sensitivity.csv"] = sensitivity_csv(session.profile, session.bundle.layers)
    if session.result is not None:
        made["front.csv"] = front_csv(session.result)
    if session.comparison is not None:
        made["comparison.csv"] = comparison_csv(session.comparison)
    return made


def bit_sentence(plan, layers) -> str:
    """Which layers the plan spares least and most, in words."""
    columns = {i: [bits for bits in column if bits is not None] for i, column in enumerate(zip(*plan.act_bits_TL))}
    mean_L = {i: sum(column) / len(column) for i, column in columns.items() if column}
    labels = layer_labels(layers)
    most, least = max(mean_L, key=mean_L.__getitem__), min(mean_L, key=mean_L.__getitem__)
    return f"Most activation bits: {labels[most]} ({mean_L[most]:.2f} on average); fewest: {labels[least]} ({mean_L[least]:.2f})."
