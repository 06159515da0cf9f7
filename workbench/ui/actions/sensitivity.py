"""Screen 2: make the map, choose what it shows, select a layer and a step."""

from __future__ import annotations

from workbench.options import LatencyConfig, QuantConfig, SensitivityConfig, TraceConfig
from workbench.ui import budgets, inputs, limits, widget
from workbench.ui.actions.common import bundle_of, run_of, select_cell
from workbench.ui.session import OF_PROFILE, Drafted, Session
from workbench.ui.views import quantities
from workbench.ui.views.layers import blocks_of
from workbench.zerogpu import stages

SENSITIVITY_INPUTS = ("estimator", "probes", "weighting", "tau", "distortion")
BROUGHT = ("link", "imported")  # where plans come from that a new profile does not take away
QUANT_INPUTS = ("transform", "solver", "hessian", "group_size", "act_grid")


def profile(session: Session, steps, seed, prompts_given, *settings) -> None:
    bundle = bundle_of(session)
    trace_config = inputs.read(TraceConfig, ("steps", "seed"), (steps, seed), prompts=inputs.prompts(prompts_given))
    split = len(SENSITIVITY_INPUTS)
    config = inputs.read(SensitivityConfig, SENSITIVITY_INPUTS, settings[:split])
    quant = inputs.read(QuantConfig, QUANT_INPUTS, settings[split:-1])
    target = inputs.read(LatencyConfig, ("target",), settings[-1:]).target
    limits.here().check(prompts=len(trace_config.prompts), steps=trace_config.steps)

    def work(on_progress):
        result = stages().profile(bundle, trace_config, config, quant, target=target, run=run_of(session), on_progress=on_progress)
        smap, start = result.sensitivity, budgets.start(result, stages().default_budget(bundle, result))
        stderr_TL = None if smap.stderr_TL is None else smap.stderr_TL.tolist()
        session.set(profile=result, fisher_TL=tuple(smap.fisher_TL.tolist()), stderr_TL=stderr_TL, budget=start)
        if session.cell[0] is None:
            select_cell(session, *smap.most_fragile)

    session.require_idle()
    session.steps, session.seed = trace_config.steps, trace_config.seed  # for a reload
    session.prompts = trace_config.prompts or session.prompts
    undo = session.kept("profile", "fisher_TL", "stderr_TL", "cell", "example", *OF_PROFILE) if session.profile is not None else {}
    brought = session.chosen if getattr(session.chosen, "origin", "") in BROUGHT else None
    if brought is not None and brought.error is not None:  # measured with the weights of the profile that goes
        brought = Drafted(brought.plan, origin=brought.origin)
    session.set(profile=None, example=None, fisher_TL=(None,) * trace_config.steps, stderr_TL=None, cell=(None, None),
                **OF_PROFILE | {"chosen": brought})
    session.submit("profile", "sensitivity", work, undo)


def click_block(session: Session, payload) -> None:
    """A cell of the block map, or a bar of its strips: select the most fragile layer of that block at that step."""
    blocks = list(blocks_of(session.bundle.layers).values()) if session.bundle else []
    steps = len(session.fisher_TL)
    part = payload.get("trace") if isinstance(payload, dict) else None
    if part == "time":
        step = widget.picked(payload, "row", steps)
        cell = None if step is None else (max(range(len(blocks)), key=lambda b: _fisher(session, blocks[b], step)), step)
    elif part == "depth":
        block = widget.picked(payload, "row", len(blocks))
        cell = None if block is None else (block, max(range(steps), key=lambda t: _fisher(session, blocks[block], t)))
    else:
        cell = widget.clicked_cell(payload, len(blocks), steps)
    if cell is not None:
        row = session.fisher_TL[cell[1]]
        select_cell(session, max(blocks[cell[0]], key=lambda i: row[i]) if row else blocks[cell[0]][0], cell[1])


def _fisher(session: Session, members, step: int) -> float:
    """Fisher information of some layers together at a step; 0 where it is not known yet."""
    row = session.fisher_TL[step]
    return sum(row[i] for i in members) if row else 0.0


def click_layer(session: Session, payload) -> None:
    if session.bundle is None or session.cell[0] is None:
        return
    layers = session.bundle.layers
    members = blocks_of(layers)[layers[session.cell[0]].block]
    cell = widget.clicked_cell(payload, len(members), len(session.fisher_TL))
    if cell is not None:
        select_cell(session, members[cell[0]], cell[1])


def pick_row(session: Session, payload) -> None:
    """A row of the tables of fragile and tolerant cells."""
    if session.bundle is None:
        return
    layer = widget.picked(payload, "layer", len(session.bundle.layers))
    step = widget.picked(payload, "step", len(session.fisher_TL))
    if layer is not None and step is not None:
        select_cell(session, layer, step)


def show_quantity(session: Session, name, how, bits) -> None:
    """What the map shows, how a block's layers are put together, and at which width. Where a quantity fixes `how`, the choice is kept
    for the others."""
    if how in quantities.PUT_TOGETHER and quantities.QUANTITIES[session.quantity].block is None:
        session.set(how=how)
    session.set(quantity=name if name in quantities.QUANTITIES else "fisher")
    if bits in quantities.bits_offered(session.profile):
        session.set(map_bits=int(bits))
