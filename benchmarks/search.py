"""This search against every rival, on the same model, weights and budgets, judged on held-out prompts.

    python benchmarks/search.py                          # five means of activation bits, three memory budgets, ablation: an hour on 2 cores
    python benchmarks/search.py --prompts 8 --steps 6    # a quick look
    python benchmarks/search.py --cost                   # how cost grows with steps and beam width, measured
    python benchmarks/search.py --exhaustive             # small problems, every plan of which is measured: minutes

Everything is kept in --run by its content: an interrupted benchmark goes on where it was, a changed one repeats only what changed.
Writes OUT.md and OUT.svg, and prints the tables. Asserts nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from workbench import tuning  # noqa: E402

tuning.tune()  # before torch is imported

from provenance import provenance  # noqa: E402
from search_contenders import OURS, Contenders  # noqa: E402
from search_exhaustive import exhaustive  # noqa: E402
from search_report import NOTES, beaten, plot, table  # noqa: E402

from workbench import metrics, pipeline, terminal  # noqa: E402
from workbench.options import Budget, Progress, QuantConfig, SearchConfig, TraceConfig, ignore_progress  # noqa: E402
from workbench.replay import trace  # noqa: E402
from workbench.replay.trace import Trace  # noqa: E402
from workbench.rollout import Rollout  # noqa: E402
from workbench.runs import Run  # noqa: E402
from workbench.search.ranking import rank_tables  # noqa: E402

BITS, MEMORY_WIDTHS, MEMORY_ACT_BITS, WEIGHT_BITS = (3.2, 3.6, 4.0, 5.0, 6.0), (3, 4, 6), 4.0, 4
FEWER_ACT_BITS = 3.6  # with which a plan of WEIGHT_BITS' bytes should be as good as uniform MEMORY_ACT_BITS
CHUNK, SEED = 16, 20_000  # held-out prompts run at a time, and the seed of the first
COST_STEPS, COST_BEAMS = (4, 10, 20, 35, 50), (1, 4, 8, 16, 32)


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One plan on the held-out prompts, prompt by prompt."""

    nmse_S: tuple[float, ...]
    psnr_db_S: tuple[float, ...]


class Judge:
    """Runs plans on held-out prompts; what a plan gave is kept by its content."""

    def __init__(self, bundle, run: Run, prompts: int, steps: int):
        self.bundle, self.run, self.steps = bundle, run, steps
        held_out = bundle.prompts("held_out")
        few = pipeline.JUDGE_PROMPTS  # the search's own judge took the first few: they come last here
        self.prompts = (*held_out[few:], *held_out[:few])[:prompts]
        self.chunks = [self._recorded(first) for first in range(0, len(self.prompts), CHUNK)]
        self.images = [bundle.decode(chunk.latent_ST[:, -1].to(bundle.device)).images for chunk in self.chunks]

    def _recorded(self, first: int) -> Trace:
        config = TraceConfig(prompts=self.prompts[first:first + CHUNK], steps=self.steps, seed=SEED + first)
        return self.run.resume(Trace, "held-out", Run.key(self.bundle.model_hash, config), lambda: trace.record(self.bundle, config))

    def __call__(self, profiled: pipeline.Profile, plan) -> Judged:
        key = Run.key(self.bundle.model_hash, plan.plan_id, profiled.trace, profiled.sensitivity.config, self.prompts, self.steps)
        return self.run.resume(Judged, "judged", key, lambda: self._judged(profiled, plan))

    def _judged(self, profiled, plan) -> Judged:
        nmse, psnr = [], []
        for chunk, images in zip(self.chunks, self.images):
            weights = pipeline.weights_of(self.bundle, profiled)
            finals = Rollout(self.bundle, chunk, weights, samples=chunk.samples, scoring="raw").final_of(plan)
            made = self.bundle.decode(finals.to(self.bundle.device)).images
            nmse += [metrics.latent_nmse(final, reference) for final, reference in zip(finals, chunk.latent_ST[:, -1])]
            psnr += [metrics.psnr_db(image, reference) for image, reference in zip(made, images)]
        return Judged(nmse_S=tuple(nmse), psnr_db_S=tuple(psnr))


def compare(args, bundle, run: Run, on_progress) -> tuple[list[str], str]:
    """All tables as Markdown lines, and the plot as SVG."""
    profiled = pipeline.profile(bundle, TraceConfig(steps=args.steps), run=run, on_progress=on_progress)
    judge = Judge(bundle, run, args.prompts, args.steps)
    config = SearchConfig(beam=args.beam, refine=args.refine, samples=args.samples)
    contenders = Contenders(bundle, profiled, run, config, on_progress)
    lines, sections, series, everything = [], {}, {}, []

    def section(title: str, found: dict, by=profiled, reference: dict | None = None):
        judged = (reference or {}) | {name: judge(by, each.plan) for name, each in found.items()}
        block = table(title, found, judged, OURS)
        print("\n".join(block), flush=True)
        lines.extend(block)
        everything.extend((each.plan, judged[name]) for name, each in found.items() if by is profiled)
        return judged

    for mean in args.bits:
        judged = section(f"{mean:g} mean activation bits, W{WEIGHT_BITS}", found := contenders.at_bits(mean, WEIGHT_BITS))
        sections[f"{mean:g} bits"] = within_cost(found, judged, mean)
        for name, each in found.items():
            series.setdefault(name, []).append((each.plan.act_bits_mean, metrics.interval(judged[name].psnr_db_S)))
    budgets = [(width, MEMORY_ACT_BITS) for width in args.memory]
    if WEIGHT_BITS in args.memory:
        budgets.append((WEIGHT_BITS, FEWER_ACT_BITS))
    for width, mean in budgets:
        max_bytes = profiled.costs.total_bytes([width] * len(bundle.layers))
        judged = section(f"{max_bytes / 1e6:.2f} MB (uniform W{width}), {mean:g} mean activation bits",
                         found := contenders.at_bytes(max_bytes, mean))
        sections[f"{max_bytes / 1e6:.2f} MB, {mean:g} bits"] = within_cost(found, judged, mean)
    lines += ["### Where a rival is better than the search beyond the interval of the paired differences", "", *beaten(OURS, sections), ""]
    if args.ablation:
        ours = contenders.at_bits(MEMORY_ACT_BITS, WEIGHT_BITS)[OURS]
        known = {OURS: judge(profiled, ours.plan)}
        section("Ablation at 4 mean activation bits, W4: what is left out", contenders.ablations(MEMORY_ACT_BITS), reference=known)
        plain = contenders.with_quant(QuantConfig(hessian="uniform"))
        section("Ablation: weights solved without Fisher weighting of the Hessian",
                {"the same search": plain.at_bits(MEMORY_ACT_BITS, WEIGHT_BITS)[OURS]}, by=plain.profiled, reference=known)
    lines += ranks(bundle, profiled, run, contenders, everything, on_progress)
    return lines, plot(series, f"{bundle.name}, W{WEIGHT_BITS}, {len(judge.prompts)} held-out prompts")


def within_cost(found: dict, judged: dict, mean: float) -> dict:
    """The contenders that cost no more than the search's own plan may: the online switch spends what it likes."""
    return {name: judged[name] for name, each in found.items() if each.plan.act_bits_mean <= mean + 1e-6}


def ranks(bundle, profiled, run: Run, contenders: Contenders, everything, on_progress) -> list[str]:
    """How each table orders all plans judged above."""
    from workbench.plans import ScoredPlan

    scored = {plan.plan_id: ScoredPlan(plan=plan, error=metrics.interval(judged.nmse_S).mean, samples=len(judged.nmse_S))
              for plan, judged in everything}
    tables = pipeline.table_variants(bundle, profiled, run=run, on_progress=on_progress) | {"adjoint, signed errors": contenders.signed}
    rows = [f"| {each.prediction} | {_number(each.spearman)} ({each.plans}) | {_number(each.spearman_near)} ({each.plans_near}) |"
            for each in rank_tables(tables, list(scored.values()), MEMORY_ACT_BITS)]
    block = ["### Rank correlation of predicted with measured error (Spearman; number of plans)", "",
             "| table | all plans | within a tenth of 4 bits |", "|---|---:|---:|", *rows, ""]
    print("\n".join(block), flush=True)
    return block


def _number(value: float | None) -> str:
    return "too few" if value is None else f"{value:.3f}"


def cost(args, bundle, on_progress) -> list[str]:
    """Measured cost of the beam, which is linear in steps, width and configurations. Nothing is read from a run."""
    beams = [beam for beam in COST_BEAMS if beam <= args.beam]
    lines = ["### Cost of the beam: model steps and seconds, measured", "",
             "| steps | " + " | ".join(f"beam {beam}" for beam in beams) + " |", "|---:|" + "---:|" * len(beams)]
    prompts = bundle.prompts("calibration")[:2]
    for steps in COST_STEPS:
        if steps > args.steps:
            break
        profiled, cells = pipeline.profile(bundle, TraceConfig(steps=steps, prompts=prompts), on_progress=on_progress), []
        for beam in beams:
            config = SearchConfig(beam=beam, samples=args.samples, refine=0, rivals="uniform", finalists=1)
            result = pipeline.search(bundle, profiled, Budget(max_mean_act_bits=4.0), config, on_progress=on_progress)
            cells.append(f"{result.evaluations} / {result.seconds:.0f} s")
        lines.append(f"| {steps} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return [*lines, ""]


def arguments(argv=None) -> argparse.Namespace:
    defaults = SearchConfig()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="emoji-flux")
    parser.add_argument("--prompts", type=int, default=64, help="held-out prompts that judge")
    parser.add_argument("--steps", type=int, default=None, help="denoising steps; default 20, with --cost the largest, 50")
    parser.add_argument("--bits", type=_numbers, default=BITS, help="means of activation bits, separated by commas")
    parser.add_argument("--memory", type=lambda text: tuple(int(n) for n in _numbers(text)), default=MEMORY_WIDTHS,
                        help="memory budgets as uniform weight widths, separated by commas; empty: none")
    parser.add_argument("--beam", type=int, default=None, help=f"beam width; default {defaults.beam}, with --cost the largest, 32")
    parser.add_argument("--refine", type=int, default=defaults.refine, help="moves of the refinement")
    parser.add_argument("--samples", type=int, default=defaults.samples, help="prompts that score a path")
    parser.add_argument("--no-ablation", dest="ablation", action="store_false")
    parser.add_argument("--cost", action="store_true", help="only measure how cost grows with steps and beam width")
    parser.add_argument("--exhaustive", action="store_true", help="only measure every plan of problems of a few steps and layers")
    parser.add_argument("--run", default="runs/benchmark-search")
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "search"), help="OUT.md and OUT.svg are written")
    args = parser.parse_args(argv)
    args.steps = args.steps or (max(COST_STEPS) if args.cost else 20)
    args.beam = args.beam or (max(COST_BEAMS) if args.cost else defaults.beam)
    return args


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(",") if part.strip())


def _progress():
    """Prints a line now and then, so that an hour is not silent."""
    last = [0.0]

    def report(progress: Progress) -> None:
        if time.monotonic() - last[0] > 15:
            last[0] = time.monotonic()
            print(f"  {progress.stage} {progress.done}/{progress.total} {progress.message}", file=sys.stderr, flush=True)
    return report if sys.stderr.isatty() else ignore_progress


def main(argv=None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = arguments(argv)
    terminal.quieten()
    bundle = pipeline.load(args.model)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    if args.cost:
        lines = ["# Search: how cost grows", "", *cost(args, bundle, _progress()), *provenance("search.py", argv, bundle)]
        out.with_name(out.name + "-cost.md").write_text("\n".join(lines))
        return
    if args.exhaustive:
        lines = ["# Search: small problems, every plan measured", "", *exhaustive(bundle, args.bits, Run(args.run), _progress()),
                 *provenance("search.py", argv, bundle)]
        out.with_name(out.name + "-exhaustive.md").write_text("\n".join(lines))
        return
    lines, drawing = compare(args, bundle, Run(args.run), _progress())
    lines += provenance("search.py", argv, bundle, f"{args.prompts} held-out prompts, one seed each, {args.steps} steps", *NOTES)
    out.with_suffix(".svg").write_text(drawing)
    out.with_suffix(".md").write_text("\n".join(["# Search against its rivals", "", f"![PSNR over bits]({out.name}.svg)", "", *lines]))


if __name__ == "__main__":
    main()
