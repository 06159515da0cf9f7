"""Every method against every other on one model: the paper's table, with honest bits and intervals.

    python benchmarks/methods.py                              # W8A8, W4A4, W3A3 on 64 held-out prompts: an hour or more on 2 cores
    python benchmarks/methods.py --prompts 4 --steps 4        # a quick look
    python benchmarks/methods.py --widths 4 --methods rtn,adatsq

Everything is kept in --run by its content: an interrupted benchmark goes on where it was, and a new method runs alone. Writes
OUT.md (tables, AdaTSQ at each rival's own effective bits, provenance) and one grid of images per width, OUT-wXaX.png; prints the
tables. Asserts nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from workbench import tuning  # noqa: E402

tuning.tune()  # before torch is imported

from provenance import provenance  # noqa: E402

from workbench import contest, metrics, pipeline, terminal  # noqa: E402
from workbench.contest.make import Settings  # noqa: E402
from workbench.contest.table import paired_cell  # noqa: E402
from workbench.options import BadInput, ContestConfig, SearchConfig, TraceConfig  # noqa: E402
from workbench.runs import Run  # noqa: E402

OURS = "adatsq"
EQUAL_BITS = 0.1  # effective weight bits within this of each other count as equal
SANE_DB = 30.0  # at eight bits every method should be above this


def matched(bundle, settings: Settings, results, options: dict) -> dict[float, object]:
    """AdaTSQ with as many effective bits as each group of rivals that is not within EQUAL_BITS of it, by those bits."""
    ours = next((result for result in results if result.method == OURS), None)
    if ours is None:
        return {}
    found = {ours.weight_bits_quantized: ours}
    for rival in sorted(results, key=lambda result: result.weight_bits_quantized):
        if rival.method.startswith(OURS) or min(abs(rival.weight_bits_quantized - bits) for bits in found) <= EQUAL_BITS:
            continue
        contest_config = settings.contest_config.model_copy(update={"effective_bits": round(rival.weight_bits_quantized, 2)})
        try:
            matched_settings = settings.model_copy(update={"contest_config": contest_config})
            _, [again], _ = contest.run_comparison(bundle, (OURS,), matched_settings, **options)
        except BadInput as error:
            print(f"{OURS} at {contest_config.effective_bits} bits: {error}")
            continue
        found[again.weight_bits_quantized] = again
    return found


def matched_table(results, found: dict) -> list[str]:
    """AdaTSQ minus each rival at the nearest effective bits, prompt by prompt."""
    lines = ["| rival | bits | AdaTSQ's bits | PSNR dB | latent NMSE | retrieval |", "|---|---|---|---|---|---|"]
    for rival in results:
        if rival.method.startswith(OURS) or not found:
            continue
        bits = min(found, key=lambda each: abs(each - rival.weight_bits_quantized))
        ours = found[bits]
        pairs = {name: vars(metrics.paired(ours.values[name], rival.values[name])) for name in ("psnr_db", "latent_nmse")}
        if rival.retrieved:
            pairs["retrieval"] = vars(metrics.paired(ours.retrieved, rival.retrieved))
        row = {"paired": pairs}
        lines.append(f"| {rival.method} | {rival.weight_bits_quantized:.2f} | {bits:.2f} | "
                     + " | ".join(paired_cell(row, name).replace("*", "\\*") for name in ("psnr_db", "latent_nmse", "retrieval")) + " |")
    return lines if len(lines) > 2 else []


def remarks(bits: int, found: dict) -> list[str]:
    """What the figures say about the order that the paper reports; facts, no verdict."""
    psnr = {row["method"]: row["psnr_db"]["mean"] for row in found["results"]}
    ranked = sorted(psnr, key=psnr.get)
    lines = [f"From worst to best by PSNR: {', '.join(ranked)}."]
    if bits == 8:
        low = [name for name in ranked if psnr[name] <= SANE_DB]
        lines.append(f"At or below {SANE_DB:g} dB: {', '.join(low) or 'none'}.")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji-flux")
    parser.add_argument("--methods", default="all")
    parser.add_argument("--widths", default="8,4,3", help="bits of weights and activations, one table each")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--beam", type=int, default=SearchConfig().beam)
    parser.add_argument("--modulation", default="stored", choices=["stored", "cached"])
    parser.add_argument("--run", default=str(ROOT / "runs" / "methods"))
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "methods"))
    options = parser.parse_args()
    try:
        compare(options)
    except BadInput as error:
        sys.exit(f"error: {error}")


def compare(options) -> None:
    """All tables, the grids and the page that holds them."""
    from PIL import Image

    started, bundle = time.perf_counter(), pipeline.load(options.model)
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    names = contest.chosen(options.methods.split(","))
    page = ["# Methods side by side", "", "Written by `benchmarks/methods.py`; the columns are explained in the README.", ""]
    with terminal.listening() as listener:
        for bits in (int(width) for width in options.widths.split(",")):
            contest_config = ContestConfig.parse({"weight_bits": bits, "act_bits": bits, "modulation": options.modulation})
            settings = Settings(contest_config=contest_config,
                                trace=TraceConfig.parse({"steps": options.steps}), search=SearchConfig.parse({"beam": options.beam}))
            held = {"prompts": bundle.prompts("held_out")[:options.prompts], "seed": options.seed, "run": Run(options.run),
                    "on_progress": listener}
            float_run, results, found = contest.run_comparison(bundle, names, settings, **held)
            grid = Path(f"{options.out}-w{bits}a{bits}.png")
            Image.fromarray(contest.image_grid(float_run, results)).save(grid, optimize=True)
            page += [f"## W{bits}A{bits}", "", contest.markdown_text(found), *remarks(bits, found), ""]
            equal = matched_table(results, matched(bundle, settings, results, held))
            page += ["AdaTSQ minus each rival, AdaTSQ's plan searched within the rival's effective bits where they differ by more than "
                     f"{EQUAL_BITS:g}:", "", *equal, ""] if equal else []
            page += [f"![rows: methods, float first; columns: prompts]({grid.name})", ""]
            print("\n".join(page[-12:]))
    facts = (f"{options.prompts} held-out prompts, seeds {options.seed} to {options.seed + options.prompts - 1}, {options.steps} steps",
             f"{time.perf_counter() - started:.0f} s of this run (what --run held is not counted)")
    page += provenance("methods.py", sys.argv[1:], bundle, *facts)
    Path(f"{options.out}.md").write_text("\n".join(page) + "\n", encoding="utf-8")
    print(f"written: {options.out}.md")


if __name__ == "__main__":
    main()
