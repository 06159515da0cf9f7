"""`python -m workbench VERB …`: the parser and the exit status. Flags are made from the option fields; `commands.py` and
`commands_judging.py` hold the commands."""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec

from workbench import commands, commands_judging, flags, terminal, tuning
from workbench.options import (
    BadInput,
    BenchConfig,
    Cancelled,
    ContestConfig,
    EvolutionConfig,
    GenerationConfig,
    LatencyConfig,
    ModelSpec,
    QuantConfig,
    SearchConfig,
    SensitivityConfig,
    TraceConfig,
)

BAD_INPUT, INTERRUPTED = 2, 130
PROFILE = (TraceConfig, GenerationConfig, SensitivityConfig)

# verb: (function, MODEL needed, options that become flags, its own flags)
VERBS = {
    "models": (commands.models, "?", (GenerationConfig,), ()),
    "profile": (commands.profile, None, (*PROFILE, QuantConfig), ("prompts",)),
    "search": (commands.search, None, (commands.Limits, LatencyConfig, *PROFILE, QuantConfig, SearchConfig), ("prompts", "plan-out")),
    "quantize": (commands.quantize, None, PROFILE, ("plan", "prompts")),
    "generate": (commands.generate, None, PROFILE, ("to", "plan", "prompts")),
    "compare": (commands_judging.compare, None, (
        commands_judging.Contest, ContestConfig, TraceConfig, GenerationConfig, SearchConfig, EvolutionConfig),
                ("prompts", "csv", "markdown", "grid")),
    "bench": (commands_judging.bench, None, (BenchConfig, GenerationConfig, QuantConfig), ("plan",)),
    "export": (commands.export, None, PROFILE, ("plan", "to", "prompts")),
    "serve": (commands.serve, "", (), ("port", "host")),
}
EXTRAS = {"compare": ("torchmetrics", "compare"), "serve": ("gradio", "app")}  # verb: (package beyond the base, its extra)
OWN_FLAGS = {
    "prompts": dict(metavar="FILE", help=".txt (one per line), .csv (column prompt) or .json (list of strings); default: the model's own"),
    "plan": dict(metavar="FILE", help="a plan written by the search"),
    "plan-out": dict(metavar="FILE", help="where to write the chosen plan; default: in the run folder or beside the JSON file"),
    "csv": dict(metavar="FILE", help="write the table as CSV there"),
    "markdown": dict(metavar="FILE", help="write the table as Markdown there, best bold, second best underlined"),
    "grid": dict(metavar="FILE", help="write a PNG there: rows are methods, columns are prompts, float first"),
    "to": dict(metavar="DIR", help="folder to write"),
    "port": dict(type=int, metavar="N", help="port of the app; default 7860"),
    "host": dict(metavar="ADDRESS", help="address to listen on; default 127.0.0.1"),
}


class Parser(argparse.ArgumentParser):
    """argparse that refuses bad input with one line instead of a page of usage."""

    def error(self, message):
        raise BadInput(f"{message} (see {self.prog} --help)")


def parser() -> argparse.ArgumentParser:
    main_parser = Parser(prog="python -m workbench",
                         description="See, search and prove mixed-precision quantization of diffusion transformers.")
    sub = main_parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=Parser)
    for name, (function, model, options, own) in VERBS.items():
        line = function.__doc__.splitlines()[0]
        each = sub.add_parser(name, help=line, description=line, allow_abbrev=False)
        if model != "":
            each.add_argument("model", metavar="MODEL", nargs=model, help=ModelSpec.model_fields["source"].description)
            each.add_argument("--device", default=ModelSpec.model_fields["device"].default,
                              help=ModelSpec.model_fields["device"].description)
        each.add_argument("--json", metavar="PATH", help="write one JSON object there; - prints it instead of the table")
        each.add_argument("--run", metavar="DIR", help="run folder: keeps what was computed, and resumes from it")
        for flag in own:
            each.add_argument(f"--{flag}", **OWN_FLAGS[flag])
        flags.add(each, *options)
        each.set_defaults(function=function)
    return main_parser


def main(argv: list[str] | None = None) -> int:
    """Run one verb; 0, 2 for bad input, 130 after Ctrl-C, 1 when the machine fails (disk, memory)."""
    try:
        args = parser().parse_args(argv)
        _check_extra(args.verb)
        terminal.check_output("--json", args.json)
        for name in ("plan_out", "csv", "markdown", "grid"):
            terminal.check_output(f"--{name.replace('_', '-')}", getattr(args, name, None))
        if args.verb == "serve":
            commands.serve(args, None)
            return 0
        with terminal.only_json(args.json):
            tuning.tune()
            terminal.quieten()
            with terminal.listening() as listener:
                result, shown = args.function(args, listener)
        terminal.deliver(args.json, result, *shown)
        return 0
    except BadInput as error:
        return _fail(f"error: {' '.join(str(error).split())}", BAD_INPUT)
    except (Cancelled, KeyboardInterrupt):
        return _fail("cancelled; nothing is half-written, and the same --run continues from here", INTERRUPTED)
    except BrokenPipeError:
        return 0  # whoever read our output has had enough
    except OSError as error:
        return _fail(f"error: {error}", 1)


def _check_extra(verb: str) -> None:
    """Raises BadInput where a verb's extra is not installed, before anything is loaded or measured."""
    package, extra = EXTRAS.get(verb, ("", ""))
    if package and find_spec(package) is None:
        raise BadInput(f"{package} is not installed, which {verb} needs; pip install 'adatsq-workbench[{extra}]'")


def _fail(line: str, status: int) -> int:
    print(line, file=sys.stderr)
    return status
