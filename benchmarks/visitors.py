"""Many visitors at once: each profiles, searches and draws through the public endpoints of the real app, which this script starts.

    python benchmarks/visitors.py                               # 20 visitors, a few minutes on 2 cores
    python benchmarks/visitors.py --sessions 3 --json visitors.json

Every visitor has prompts, a seed and a budget of its own. Checked: no call fails, what comes back is the caller's own, and for
--sampled visitors the images equal those that the pipeline makes here from the same inputs. Measured: how long calls wait in line and
run, how long a light request takes meanwhile (the page and its configuration, every half second), and the server's memory. Prints
Markdown; exit status 1 where a check failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

SETTINGS = {"probes": 1}
SEARCH = {"beam": 1, "samples": 2, "finalists": 1, "refine": 0, "rivals": "uniform"}
START_S, CALL_S, LIGHT_EVERY_S = 120, 3600, 0.5  # seconds
LIGHT = ("/", "/config")
MB = 1_000_000


class Server:
    """The app in a process of its own, on a free port; files of its runs in `folder`."""

    def __init__(self, folder: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", folder / "server.txt"
        env = os.environ | {"ADATSQ_RUNS": str(folder / "runs"), "GRADIO_TEMP_DIR": str(folder / "gradio")}
        self.process = subprocess.Popen([sys.executable, "app.py", "--port", str(port)], cwd=ROOT, env=env, start_new_session=True,
                                        stdout=self.log.open("wb"), stderr=subprocess.STDOUT)
        limit = time.monotonic() + START_S
        while not self._ready():
            if self.process.poll() is not None or time.monotonic() > limit:
                self.stop()
                raise SystemExit(f"the app did not start:\n{self.log.read_text()[-2000:]}")
            time.sleep(0.2)

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(self.url, timeout=5) as reply:
                return "X-Starting" not in reply.headers
        except OSError:
            return False

    def memory_bytes(self, kind: str = "VmRSS") -> int:
        """VmRSS: resident now. VmHWM: the most so far."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(kind))

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait(20)


@dataclass(kw_only=True)
class Visit:
    """What a visitor asked for, got, and what was wrong with it. calls: stage: (seconds in line, seconds of work)."""

    number: int
    prompts: list[str]
    seed: int
    act_bits: float
    seconds: float = 0.0
    calls: dict[str, tuple[float, float]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    profile_id: str = ""
    fisher: str = ""
    compute: str = ""
    plan: dict | None = None
    images: list[dict] = field(default_factory=list)

    def must(self, holds: bool, what: str) -> None:
        if not holds:
            self.faults.append(what)


def visit(it: Visit, url: str, steps: int, folder: Path, together: threading.Barrier) -> Visit:
    """The heavy part of the guided visit: profile, search, generate."""
    from gradio_client import Client

    try:
        client = Client(url, verbose=False, download_files=str(folder / f"visitor-{it.number}"), analytics_enabled=False)
    finally:
        together.wait(START_S)
    started = time.monotonic()

    def ask(stage, **values):
        answer = client.submit(api_name=f"/{stage}", **values).result(CALL_S)
        it.calls[stage] = (answer["waited_s"], answer["ran_s"])
        return answer

    try:
        profiled = ask("profile", prompts=it.prompts, steps=steps, seed=it.seed, settings=SETTINGS)
        it.profile_id, it.fisher = profiled["profile_id"], json.dumps(profiled["fisher"])
        it.must(profiled["prompts"] == it.prompts and profiled["seed"] == it.seed, "the profile is of other prompts or another seed")
        budget_mb = profiled["default_budget"]["budget_mb"]
        found = ask("search", profile_id=it.profile_id, budget_mb=budget_mb, act_bits=it.act_bits, settings=SEARCH)
        chosen, it.plan = found["chosen"], found["chosen"]["plan"]
        it.must(found["profile_id"] == it.profile_id and len(it.plan["sigma_T"]) == steps, "the search is of another profile")
        it.must(it.plan["act_bits_mean"] <= it.act_bits + 1e-9, f"a mean of {it.plan['act_bits_mean']} bits is over {it.act_bits}")
        made = ask("generate", plan=it.plan, profile_id=it.profile_id, prompts=it.prompts, seed=it.seed, steps=steps)
        it.images, it.compute = made["images"], made["compute"]
        own = [(prompt, it.seed + place) for place, prompt in enumerate(it.prompts)]
        it.must([(image["prompt"], image["seed"]) for image in it.images] == own, "the images are of other prompts or seeds")
        it.must(made["plan_id"] == chosen["plan_id"], "the images are of another plan")
    except Exception as error:  # every kind counts as a fault of the visit
        it.faults.append(f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0][:200]}")
    it.seconds = time.monotonic() - started
    return it


def watch(url: str, stop: threading.Event, latencies_s: dict[str, list[float]], faults: list[str]) -> None:
    """Ask for light things at a steady pace until told to stop."""
    while not stop.wait(LIGHT_EVERY_S):
        for path in LIGHT:
            started = time.monotonic()
            try:
                with urllib.request.urlopen(url + path, timeout=60) as reply:
                    reply.read()
                latencies_s[path].append(time.monotonic() - started)
            except OSError as error:
                faults.append(f"GET {path}: {error}")


def check_images(visits: list[Visit], steps: int) -> None:
    """Make the images of some visits here, from their prompts, seeds and plans, and compare every pixel."""
    from workbench import tuning

    tuning.tune()
    import numpy as np
    from PIL import Image

    from workbench import pipeline
    from workbench.options import QuantConfig, SensitivityConfig, TraceConfig

    bundle = pipeline.load()
    for it in visits:
        trace = TraceConfig(prompts=tuple(it.prompts), steps=steps, seed=it.seed)
        found = pipeline.profile(bundle, trace, SensitivityConfig(**SETTINGS), QuantConfig())
        quantized = pipeline.quantize(bundle, found, pipeline.validate_plan(bundle, it.plan))
        pairs = pipeline.compare(bundle, quantized, it.prompts, it.seed, steps).pairs
        for pair, image in zip(pairs, it.images):
            for name, expected in (("image", pair.image_quantized), ("image_float", pair.image_float)):
                same = np.array_equal(np.asarray(Image.open(image[name])), expected)
                it.must(same, f"{name} of {pair.prompt!r} differs from the pipeline's")


def mixed_up(visits: list[Visit]) -> list[str]:
    """What two visitors may not have in common."""
    done = [it for it in visits if it.profile_id]
    return [f"two visitors were given the same {what}" for what in ("profile_id", "fisher")
            if len({getattr(it, what) for it in done}) != len(done)]


def spread(values: list[float], scale: float = 1.0) -> dict:
    """Median, 95th percentile and maximum; empty where there is nothing."""
    if not values:
        return {}
    ordered = sorted(value * scale for value in values)
    return {"median": statistics.median(ordered), "p95": ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))], "max": ordered[-1],
            "n": len(ordered)}


def own_prompts(sessions: int, each: int) -> list[list[str]]:
    """Different prompts for every visitor, of the kind that the embedded model knows."""
    from workbench import pipeline

    known = pipeline.load().prompts("calibration")
    return [[f"{known[(number * each + place) % len(known)]} {number}" for place in range(each)] for number in range(sessions)]


def markdown(result: dict) -> str:
    memory, lines = result["memory_mb"], []
    lines.append(f"{result['sessions']} visitors at once, {result['prompts']} prompts and {result['steps']} steps each, in "
                 f"{result['seconds']:.0f} s on {result['machine']}.\n")
    lines += ["| | median | 95 % | max | n |", "|---|---:|---:|---:|---:|"]
    for name, found in result["times"].items():
        if found:
            lines.append(f"| {name} | {found['median']:.2f} | {found['p95']:.2f} | {found['max']:.2f} | {found['n']} |")
    lines += ["", f"Server memory: {memory['before']:.0f} MB before, {memory['after']:.0f} MB after, {memory['peak']:.0f} MB at most.",
              f"Images of visitors {', '.join(map(str, result['sampled'])) or 'none'} compared pixel by pixel with the pipeline's. "
              f"Computed by: {'; '.join(result['compute'])}.", ""]
    return "\n".join([*lines, *([f"- fault: {fault}" for fault in result["faults"]] or ["No fault."])])


def measure(args, folder: Path) -> dict:
    from gradio_client import Client

    prompts = own_prompts(args.sessions, args.prompts)
    visits = [Visit(number=n, prompts=prompts[n], seed=1000 * n, act_bits=round(4 + 0.05 * n, 2)) for n in range(args.sessions)]
    server, stop = Server(folder), threading.Event()
    latencies_s, light_faults = {path: [] for path in LIGHT}, []
    try:
        warm = Client(server.url, verbose=False, download_files=str(folder / "warm"), analytics_enabled=False)
        warm.predict(api_name="/generate", prompts=["noto pizza"], steps=1)  # the model is loaded now
        before = server.memory_bytes()
        watcher = threading.Thread(target=watch, args=(server.url, stop, latencies_s, light_faults))
        together = threading.Barrier(args.sessions)
        started = time.monotonic()
        watcher.start()
        with ThreadPoolExecutor(args.sessions) as visitors:
            list(visitors.map(lambda it: visit(it, server.url, args.steps, folder, together), visits))
        seconds = time.monotonic() - started
        stop.set()
        watcher.join()
        memory = {"before": before / MB, "after": server.memory_bytes() / MB, "peak": server.memory_bytes("VmHWM") / MB}
    finally:
        stop.set()
        server.stop()
    drawn = [it for it in visits if it.images]
    sampled = drawn[:: max(1, len(drawn) // max(1, args.sampled))][: args.sampled]
    check_images(sampled, args.steps)
    faults = [f"visitor {it.number}: {fault}" for it in visits for fault in it.faults] + mixed_up(visits) + light_faults
    calls = {stage: [it.calls[stage] for it in visits if stage in it.calls] for stage in ("profile", "search", "generate")}
    times = {f"{stage}: {what}, s": spread([call[place] for call in found]) for stage, found in calls.items()
             for place, what in enumerate(("in line", "at work"))}
    times |= {"in line, all calls, s": spread([call[0] for found in calls.values() for call in found]),
              "whole visit, s": spread([it.seconds for it in visits])}
    times |= {f"GET {path} meanwhile, ms": spread(found, 1000) for path, found in latencies_s.items()}
    return {"sessions": args.sessions, "steps": args.steps, "prompts": args.prompts, "seconds": seconds, "times": times,
            "memory_mb": memory, "faults": faults, "sampled": [it.number for it in sampled],
            "compute": sorted({it.compute for it in drawn}), "machine": f"{os.cpu_count()} cores, {platform.machine()}",
            "visits": [{name: value for name, value in asdict(it).items() if name in ("number", "seed", "seconds", "calls", "faults")}
                       for it in visits]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sessions", type=int, default=20, help="visitors at once")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps")
    parser.add_argument("--prompts", type=int, default=2, help="prompts of each visitor")
    parser.add_argument("--sampled", type=int, default=3, help="visitors whose images are made again here and compared")
    parser.add_argument("--json", help="write everything measured to this file")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the server must end with this script
    with tempfile.TemporaryDirectory(prefix="visitors-") as folder:
        result = measure(args, Path(folder))
    print(markdown(result))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1), encoding="utf-8")
    return 1 if result["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
