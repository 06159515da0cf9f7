"""What the buttons do: each action reads the form, changes the session or starts a job, and raises BadInput in one line."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from workbench import prompts
from workbench.options import BadInput, Budget, ModelSpec, QuantConfig, SearchConfig, SensitivityConfig, TraceConfig
from workbench.ui import forms, widget
from workbench.ui.session import OF_PROFILE, Imported, Session, stages
from workbench.ui.tables import MB
from workbench.ui.views import blocks_of, layer_labels

SENSITIVITY_FORM = ("estimator", "probes", "weighting", "tau", "distortion")
QUANT_FORM = ("transform", "solver", "hessian", "group_size", "modulation_bits")
SEARCH_FORM = ("beam", "configs", "samples", "scoring", "rollout", "finalists")
PLAN_LIMIT_BYTES = 8_000_000
PROMPTS_COMPARED = 8
SOURCE_LIMIT = 1000


def need(value, what: str):
    if value is None:
        raise BadInput(what)
    return value


def _bundle(session: Session):
    return need(session.bundle, "no model is loaded yet; wait for it or load one on the Model screen")


def _profile(session: Session):
    return need(session.profile, "profile the model first, on the Sensitivity screen")


def _chosen(session: Session):
    return need(session.chosen, "no plan is chosen; search for one, or import one on the Export screen")


def _run(session: Session):
    """The session's own run folder: what is in it is used again, so a stopped search goes on where it was."""
    from workbench.runs import Run

    return Run(session.folder)


# Model

def load_model(session: Session, source: str | None) -> None:
    source = (source or "").strip()
    if not 0 < len(source) <= SOURCE_LIMIT:
        raise BadInput(f"a model is named by 1 to {SOURCE_LIMIT} characters, not {len(source)}: an embedded name, a folder or a hub id")
    spec = ModelSpec.parse({"source": source}, "model")

    def work(on_progress):
        session.adopt(stages().load(spec.source, on_progress=on_progress))

    session.submit("load", "model", work)


def keep_prompts(session: Session, text: str) -> None:
    session.prompts_text = text  # drawn again only after a reload: the box already shows it


def upload_prompts(session: Session, path: str | None) -> None:
    found = prompts.read(Path(need(path, "no file was received")))
    TraceConfig.parse({"prompts": found}, "prompt file")
    session.set(prompts_text="\n".join(found))
    session.say("model", f"{len(found)} prompts were read", "info")


# Sensitivity

def profile(session: Session, steps, seed, prompts_text, *settings) -> None:
    bundle = _bundle(session)
    trace_config = forms.read(TraceConfig, ("steps", "seed"), (steps, seed), prompts=prompts.parse_lines(prompts_text or ""))
    split = len(SENSITIVITY_FORM)
    config = forms.read(SensitivityConfig, SENSITIVITY_FORM, settings[:split])
    quant = forms.read(QuantConfig, QUANT_FORM, settings[split:])

    def work(on_progress):
        result = stages().profile(bundle, trace_config, config, quant, run=_run(session), on_progress=on_progress)
        smap, budget = result.sensitivity, stages().default_budget(bundle, result)
        session.set(profile=result, fisher_TL=tuple(smap.fisher_TL.tolist()), stderr_TL=smap.stderr_TL.tolist(),
                    budget=(math.ceil(budget.max_weight_bytes / MB * 100) / 100, budget.max_mean_act_bits))

    session.require_idle()
    session.steps, session.seed, session.prompts_text = trace_config.steps, trace_config.seed, prompts_text  # for a reload
    undo = session.kept("profile", "fisher_TL", "stderr_TL", "cell", *OF_PROFILE) if session.profile is not None else {}
    session.set(profile=None, fisher_TL=(None,) * trace_config.steps, stderr_TL=None, cell=(None, None), **OF_PROFILE)
    session.submit("profile", "sensitivity", work, undo)


def memory_range(costs) -> tuple[float, float]:
    """Smallest and largest megabytes that a plan can take."""
    per_layer_LC = costs.weight_bytes_LC
    return ((costs.fixed_bytes + int(per_layer_LC.min(1).values.sum())) / MB,
            (costs.fixed_bytes + int(per_layer_LC.max(1).values.sum())) / MB)


def click_block(session: Session, payload) -> None:
    """A cell of the block map: select the most fragile layer of that block at that step."""
    blocks = list(blocks_of(session.bundle.layers).values()) if session.bundle else []
    cell = widget.clicked_cell(payload, len(blocks), len(session.fisher_TL))
    if cell is not None:
        row = session.fisher_TL[cell[1]]
        layer = max(blocks[cell[0]], key=lambda i: row[i]) if row else blocks[cell[0]][0]
        session.set(cell=(layer, cell[1]))


def click_layer(session: Session, payload) -> None:
    if session.bundle is None or session.cell[0] is None:
        return
    layers = session.bundle.layers
    members = blocks_of(layers)[layers[session.cell[0]].block]
    cell = widget.clicked_cell(payload, len(members), len(session.fisher_TL))
    if cell is not None:
        session.set(cell=(members[cell[0]], cell[1]))


def click_row(session: Session, payload, rows) -> None:
    """A row of the table of fragile cells."""
    cell = widget.clicked_cell({"row": payload["index"][0], "column": 0}, len(rows), 1)
    if cell is not None and session.bundle is not None:
        labels = layer_labels(session.bundle.layers)
        step, label = int(rows[cell[0]][1]), rows[cell[0]][2]
        if label in labels and 0 <= step < len(session.fisher_TL):
            session.set(cell=(labels.index(label), step))


def aggregate(session: Session, how: str) -> None:
    session.set(how="sum" if how == "sum" else "mean")


# Search

def _budget(session: Session, budget_mb, budget_bits) -> Budget:
    for value, unit in ((budget_mb, "MB"), (budget_bits, "bits")):
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise BadInput(f"the budget in {unit} must be a number")
    return Budget.parse({"max_weight_bytes": round(budget_mb * MB), "max_mean_act_bits": budget_bits}, "budget")


def search(session: Session, budget_mb, budget_bits, *settings) -> None:
    bundle, found = _bundle(session), _profile(session)
    budget = _budget(session, budget_mb, budget_bits)
    config = forms.read(SearchConfig, SEARCH_FORM, settings)
    least_mb, _ = memory_range(found.costs)
    if budget_mb < least_mb:
        raise BadInput(f"the budget of {budget_mb:.2f} MB is below the smallest feasible, {least_mb:.2f} MB")

    def work(on_progress):
        result = stages().search(bundle, found, budget, config, run=_run(session), on_progress=on_progress)
        session.set(result=result, events=result.events, replay=None, chosen=result.chosen, comparison=None, exported=None)

    session.require_idle()
    undo = session.kept("events", "result") if session.result is not None else {}
    session.set(events=(), result=None, budget=(budget_mb, budget_bits))
    session.submit("search", "search", work, undo)


def move_budget(session: Session, budget_mb, budget_bits) -> None:
    """A slider was moved: draw its line and pick again from the finished front, at once."""
    budget = _budget(session, budget_mb, budget_bits)
    session.set(budget=(budget_mb, budget_bits))
    if session.result is not None:
        choose(session, _select(session.result.front, budget))


def _select(front, budget: Budget):
    """The plan of least error within budget; if none fits, say what would, in the units of the sliders."""
    from workbench.search import pareto

    if not any(pareto.within(pareto.plan_point(scored), budget) for scored in front):
        least_mb = min(scored.plan.weight_bytes for scored in front) / MB
        least_bits = min(scored.plan.act_bits_mean for scored in front)
        raise BadInput(f"no plan of the front is within {budget.max_weight_bytes / MB:.2f} MB and {budget.max_mean_act_bits:g} bits; the "
                       f"smallest takes {least_mb:.2f} MB, the fewest mean activation bits are {least_bits:.2f}")
    return pareto.select(front, budget)


def choose(session: Session, scored) -> None:
    """Make a plan the chosen one; the search's own choice keeps its judgement on held-out prompts."""
    best = session.result.chosen if session.result is not None else None
    if best is not None and best.plan.plan_id == scored.plan.plan_id:
        scored = best
    if session.chosen is None or scored.plan.plan_id != session.chosen.plan.plan_id:
        session.set(chosen=scored, comparison=None, exported=None)


def click_point(session: Session, payload) -> None:
    if session.result is not None:
        plans = {"front": session.result.front, "references": session.result.references}
        point = widget.clicked_point(payload, {name: len(rows) for name, rows in plans.items()})
        if point is not None:
            choose(session, plans[point[0]][point[1]])


def replay(session: Session, step) -> None:
    """Look at an earlier step of the beam; None follows the search."""
    session.set(replay=step)


def stop(session: Session) -> None:
    session.cancel()


# Compare

def _quantized(session: Session, on_progress):
    """The chosen plan as a quantized model, made once."""
    bundle, found, scored = _bundle(session), _profile(session), _chosen(session)
    if session.quantized is None or session.quantized[0] != scored.plan.plan_id:
        session.quantized = (scored.plan.plan_id, stages().quantize(bundle, found, scored.plan, on_progress=on_progress))
    return session.quantized[1]


def compare(session: Session, prompts_text, seed, steps) -> None:
    bundle, _, _ = _bundle(session), _profile(session), _chosen(session)
    config = forms.read(TraceConfig, ("steps", "seed"), (steps, seed), prompts=prompts.parse_lines(prompts_text or ""))
    if not 1 <= len(config.prompts) <= PROMPTS_COMPARED:
        raise BadInput(f"{len(config.prompts)} prompts to compare; write 1 to {PROMPTS_COMPARED}, one per line")

    def work(on_progress):
        model = _quantized(session, on_progress)
        session.set(comparison=stages().compare(bundle, model, config.prompts, config.seed, config.steps, on_progress=on_progress), pair=0)

    session.submit("compare", "compare", work)


def show_pair(session: Session, index) -> None:
    if session.comparison is not None and isinstance(index, int) and 0 <= index < len(session.comparison.pairs):
        session.set(pair=index)


def set_gain(session: Session, gain) -> None:
    session.set(gain=float(gain))


# Export

def export(session: Session) -> None:
    bundle, _, scored = _bundle(session), _profile(session), _chosen(session)
    folder = session.folder / "export" / f"{bundle.name}-{scored.plan.plan_id}"

    def work(on_progress):
        model = _quantized(session, on_progress)
        stages().export(bundle, model, folder)
        archive = shutil.make_archive(str(session.downloads / folder.name), "zip", folder)
        session.set(exported=(folder, Path(archive)))

    session.submit("export", "export", work)


def plan_file(session: Session) -> str | None:
    """The chosen plan as a JSON file to download."""
    if session.chosen is None:
        return None
    plan = session.chosen.plan
    path = session.downloads / f"plan-{plan.plan_id}.json"
    if not path.exists():
        path.write_text(plan.model_dump_json(indent=1))
    return str(path)


def import_plan(session: Session, path: str | None) -> None:
    bundle = _bundle(session)
    file = Path(need(path, "no file was received"))
    if file.stat().st_size > PLAN_LIMIT_BYTES:
        raise BadInput(f"the plan file has {file.stat().st_size / MB:.1f} MB; a plan has less than {PLAN_LIMIT_BYTES / MB:.0f} MB")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise BadInput("the plan file is not UTF-8 text; a plan is the JSON that this screen exports") from None
    plan = stages().validate_plan(bundle, text)
    choose(session, Imported(plan))
    session.say("export", f"plan {plan.plan_id} ({plan.method}) was read and is now the chosen plan", "info")
