"""What programs may call over HTTP: `/profile`, `/search` and `/generate`. Everything else of the page is private.

A call does what the page's buttons do: the same limits, the same line of jobs, a wrong setting is one clear line. Results go to
their caller alone. A profile stays on the server under an id that nobody can guess, and whoever holds the id may use it.
"""
# No `from __future__ import annotations` here: gradio reads the types of the API from the annotations, as objects.

import asyncio
import functools
import hashlib
import inspect
import logging
import math
import time
from collections.abc import Callable

import gradio as gr

from workbench import commands, model_info
from workbench.options import (
    ACT_BITS,
    BadInput,
    Frozen,
    GenerationConfig,
    LatencyConfig,
    OnProgress,
    QuantConfig,
    SearchConfig,
    SensitivityConfig,
    TraceConfig,
    first_line,
)
from workbench.prompts import check
from workbench.ui import limits, pictures
from workbench.ui.actions.common import run_of
from workbench.ui.actions.model import source_of
from workbench.ui.session import EMBEDDED, Session, Store
from workbench.zerogpu import stages

log = logging.getLogger("workbench.ui")
PUBLIC = ("profile", "search", "generate")
SHOWN = 4  # showcase prompts that are drawn when none is given
POLL_S = 0.1


def add(store: Store) -> None:
    """Offer the endpoints; call this inside the page's Blocks."""
    offered = Endpoints(store)
    for name in PUBLIC:
        endpoint = getattr(offered, name)
        gr.api(endpoint, api_name=name, api_description=inspect.getdoc(endpoint), concurrency_limit=None)


def one_line(endpoint: Callable) -> Callable:
    """Whatever goes wrong reaches the caller as one line."""
    @functools.wraps(endpoint)
    async def call(*args, **kwargs):
        try:
            return await endpoint(*args, **kwargs)
        except BadInput as error:
            raise gr.Error(str(error), print_exception=False) from None
        except Exception as error:
            log.exception("%s failed", endpoint.__name__)
            raise gr.Error(f"{endpoint.__name__} failed: {type(error).__name__}: {first_line(error)}", print_exception=False) from None

    return call


class Endpoints:
    """Checks run beside the event loop, work runs as a job of the board, and a call waits without holding a thread."""

    def __init__(self, store: Store):
        self.store = store
        self.waiting = 0

    @one_line
    async def profile(self, request: gr.Request, model: str = EMBEDDED, prompts: list[str] | None = None, steps: int = TraceConfig().steps,
                      seed: int = TraceConfig().seed, settings: dict | None = None) -> dict:
        """Record the float model and measure how sensitive each step and layer is.

        model: an embedded name; on your own machine also the folder of a diffusers pipeline, or a hub id.
        prompts: calibration prompts; left out: the model's own. steps: denoising steps. seed: of the first prompt.
        settings: fields of SensitivityConfig, QuantConfig, LatencyConfig (probes, transform, group_size, target, ...) and GenerationConfig
        (height, width, frames, guidance, true_guidance, text_tokens, negative_prompt).

        Returns profile_id (a secret: whoever holds it may search in this profile), model, prompts, seed, layers, sigma (one per step),
        fisher, alpha and stderr (rows are steps, columns layers), what any plan can cost (reachable), default_budget, and seconds.
        """
        session, work = await asyncio.to_thread(self._profile, model, prompts, steps, seed, settings)
        return await self._answer("profile", session, request, work)

    @one_line
    async def search(self, request: gr.Request, profile_id: str, budget_mb: float | None = None, act_bits: float | None = None,
                     budget_ms: float | None = None, pick: str = "best", settings: dict | None = None) -> dict:
        """Find the plans of a profile that trade bits for error best, and choose one within a budget.

        profile_id: from /profile. budget_mb: resident megabytes (10^6 bytes) of the transformer. act_bits: mean activation bits over
        steps and layers. budget_ms: milliseconds of one image on the profile's target. No budget at all: 4-bit weights, 4-bit mean.
        pick: best (least error within the budget), knee, or a quality floor in dB. settings: fields of SearchConfig (beam, samples, ...).

        Returns front (weight_bytes, act_bits_mean, latency_ms, error of each plan), chosen (the same with the 95 % interval low to high,
        and plan: the plan as JSON, which /generate and the command line take), references, evaluations, seconds.
        """
        wanted = {"budget_mb": budget_mb, "act_bits": act_bits, "budget_ms": budget_ms, "pick": pick}
        session, work = await asyncio.to_thread(self._search, profile_id, wanted, settings)
        return await self._answer("search", session, request, work)

    @one_line
    async def generate(self, request: gr.Request, prompts: list[str] | None = None, seed: int = TraceConfig().seed,
                       steps: int = TraceConfig().steps, model: str | None = None, plan: dict | None = None,
                       profile_id: str | None = None, settings: dict | None = None) -> dict:
        """Draw images with the float model or, when a plan is given, with both models from the same seeds.

        prompts: one image each; left out: some of the model's own. seed: of the first image, seed + i of the others.
        steps: denoising steps. model: the embedded one unless a profile_id is given. plan: a plan as JSON, from /search.
        profile_id: whose weights the plan uses; left out: the model is profiled first with its own prompts and the plan's settings,
        which takes longer. settings: fields of GenerationConfig; left out: those of the profile or the plan.

        Returns images: prompt, seed, image (a lossless PNG file) and, with a plan, image_float, latent_nmse, psnr_db and ssim
        against float; metrics (mean, 95 % interval low to high, n), plan_id, profile_id, compute (the kernel or "emulated", and why)
        and bytes.
        """
        session, work = await asyncio.to_thread(self._generate, prompts, seed, steps, model, plan, profile_id, settings)
        return await self._answer("generate", session, request, work)

    # What each checks at once, and its work.

    def _profile(self, model, prompts, steps, seed, settings) -> tuple[Session, Callable]:
        source, trace = source_of(_text(model, "model")), _trace(prompts, steps, seed)
        sensitivity, quant, latency, asked = _options(settings, SensitivityConfig, QuantConfig, LatencyConfig, GenerationConfig)
        limits.here().check(prompts=len(trace.prompts), steps=trace.steps)
        session = self.store.open("")

        def work(on_progress):
            bundle = _load(source, asked, on_progress)
            found = _profiled(session, bundle, trace, sensitivity, quant, latency.target, on_progress)
            used = trace.prompts or bundle.prompts("calibration")
            return {"profile_id": session.id, "model": bundle.name, "prompts": list(used), "seed": trace.seed,
                    **commands.profile_json(found), "reachable": _reachable(found), "default_budget": _default_budget(bundle, found)}

        return session, work

    def _search(self, profile_id, wanted: dict, settings) -> tuple[Session, Callable]:
        session = self._find(profile_id)
        bundle, found = session.bundle, session.profile
        [config] = _options(settings, SearchConfig)
        terms = commands.Limits.parse(wanted, "budget")
        unlimited = all(wanted[name] is None for name in ("budget_mb", "act_bits", "budget_ms"))
        budget = stages().default_budget(bundle, found) if unlimited else terms.budget()
        from workbench.search import selection

        if blamed := selection.blame(budget, _feasible(found)):
            raise BadInput("the budget is not feasible: " + "; ".join(blamed))

        def work(on_progress):
            result = stages().search(bundle, found, budget, config, run=run_of(session), on_progress=on_progress)
            picked = commands.picked_from(result, budget, terms.pick)
            answer = {"profile_id": session.id, "model": bundle.name, **commands.search_json(result, picked)}
            answer["chosen"] |= {"plan_id": picked.plan.plan_id, "plan": picked.plan.model_dump(mode="json")}
            return answer

        return session, work

    def _generate(self, prompts, seed, steps, model, plan, profile_id, settings) -> tuple[Session, Callable]:
        trace, here = _trace(prompts, steps, seed), limits.here()
        [asked] = _options(settings, GenerationConfig)
        if len(trace.prompts) > here.compared:
            raise BadInput(f"{len(trace.prompts)} prompts to draw; give 1 to {here.compared}")
        here.check(steps=trace.steps)
        known = None if profile_id is None else self._find(profile_id)
        if known is not None and asked.over(known.bundle.generation) != known.bundle.generation:
            raise BadInput(f"the profile was made for {known.bundle.generation.words}; leave the settings out, or profile with them")
        source = source_of(_text(model, "model")) if model is not None else known.source if known else EMBEDDED
        if known is not None and source != known.source:
            raise BadInput(f"the profile is of {known.source}, not of {source}; leave one of the two out")
        if plan is not None:
            from workbench.plans import BitPlan

            plan = BitPlan.parse(plan, "plan")
            here.check(steps=len(plan.sigma_T))
            asked = asked.over(plan.generation)
        session = known or self.store.open("")

        def work(on_progress):
            bundle = session.bundle if known else _load(source, asked, on_progress)
            texts = trace.prompts or tuple(bundle.prompts("showcase")[:SHOWN])
            if plan is None:
                return {"model": bundle.name, "steps": trace.steps, "plan_id": None,
                        **_drawn(session, stages().draw(bundle, texts, trace.seed, trace.steps, on_progress=on_progress))}
            quantized = _quantized(session, bundle, plan, on_progress)
            made = stages().compare(bundle, quantized, texts, trace.seed, trace.steps, on_progress=on_progress)
            return {"model": bundle.name, "steps": trace.steps, "plan_id": plan.plan_id, "profile_id": session.id,
                    **_compared(session, made)}

        return session, work

    def _find(self, profile_id) -> Session:
        """The session that holds a profile of its own; an example has neither trajectories nor weights."""
        session = self.store.find(_text(profile_id, "profile_id"))
        if session is None or session.profile is None or session.example is not None:
            raise BadInput("no profile has this id any more; call /profile and use the profile_id it returns")
        return session

    async def _answer(self, kind: str, session: Session, request: gr.Request, work: Callable) -> dict:
        """Run `work` as a job of this caller and wait for it, showing how far it is; a call that is cancelled takes its job along."""
        if self.waiting >= limits.here().waiting:
            raise BadInput(f"{self.waiting} calls are in line already, as many as are allowed here; try again later")
        board, asked, progress = self.store.board, time.monotonic(), gr.Progress()
        job = board.submit(kind, _owner(request, session), work)
        session.set(job=job)
        self.waiting += 1
        try:
            while job.active:
                state = board.snapshot(job)
                words = f"waiting, {state.ahead} ahead" if state.state == "queued" else state.message or state.stage
                progress((state.done, state.total or None), desc=words)
                await asyncio.sleep(POLL_S)
        finally:
            self.waiting -= 1
            if job.active:
                board.cancel(job)
        self.store.find(session.id)  # it has been used until now
        if job.state != "done":
            raise BadInput(job.error or f"{kind} was cancelled")
        ran_s = job.snapshot().seconds
        return {**job.result, "ran_s": round(ran_s, 3), "waited_s": round(max(0.0, time.monotonic() - asked - ran_s), 3)}


def _owner(request: gr.Request, session: Session) -> str:
    """Who waits in line: the caller's own session hash, or each call by itself; never a name that the page uses."""
    return "http-" + hashlib.sha256((request.session_hash or session.id).encode()).hexdigest()[:16]


def _text(value, what: str) -> str:
    if not isinstance(value, str):
        raise BadInput(f"{what} must be a text")
    return value


def _trace(prompts, steps, seed) -> TraceConfig:
    """Prompts, steps and seed of a call; raises BadInput for anything but plain texts and whole numbers in range."""
    config = TraceConfig.parse({"prompts": prompts if prompts is not None else (), "steps": steps, "seed": seed}, "request")
    return config.model_copy(update={"prompts": check(config.prompts)}) if config.prompts else config


def _options(settings, *kinds: type[Frozen]) -> list:
    """One of each kind of options, made from the fields that the caller names; a name that several know (seed) goes to each."""
    if not isinstance(settings, dict | None):
        raise BadInput("settings must be an object of setting names and values")
    given, known = settings or {}, {name for kind in kinds for name in kind.model_fields}
    for name in given:
        if name not in known:
            raise BadInput(f"settings: {str(name)[:40]!r} is unknown; use {', '.join(sorted(known))}")
    return [kind.parse({name: value for name, value in given.items() if name in kind.model_fields}, "settings") for kind in kinds]


def _load(source: str, asked: GenerationConfig, on_progress: OnProgress):
    if not stages().is_loaded(source):
        model_info.require_room(model_info.of(source))
    bundle = stages().load(source, on_progress=on_progress).at(asked)
    limits.here().check(tokens=bundle.tokens)
    return bundle


def _profiled(session: Session, bundle, trace: TraceConfig, sensitivity, quant, target: str, on_progress: OnProgress):
    """A fresh profile, kept in the session."""
    found = stages().profile(bundle, trace, sensitivity, quant, target=target, run=run_of(session), on_progress=on_progress)
    session.set(source=bundle.source, bundle=bundle, profile=found, example=None)
    return found


def _quantized(session: Session, bundle, plan, on_progress: OnProgress):
    """The model of a plan, made once; without a profile, from one of the model's own prompts at the plan's settings."""
    plan = stages().validate_plan(bundle, plan)
    found = session.profile or _profiled(session, bundle, TraceConfig(steps=len(plan.sigma_T)), SensitivityConfig(), plan.quant,
                                         LatencyConfig().target, on_progress)
    if session.quantized is None or session.quantized[0] != plan.plan_id:
        session.quantized = (plan.plan_id, stages().quantize(bundle, found, plan, on_progress=on_progress))
    return session.quantized[1]


def _feasible(found):
    from workbench.search import selection

    return selection.feasible(found.costs, ACT_BITS, found.sensitivity.steps)


def _reachable(found) -> dict:
    """Least and most that a plan can cost on each axis."""
    reach = _feasible(found)
    return {"weight_bytes": list(reach.weight_bytes), "act_bits_mean": list(reach.mean_act_bits),
            "latency_ms": None if reach.latency_ms is None else list(reach.latency_ms)}


def _default_budget(bundle, found) -> dict:
    budget = stages().default_budget(bundle, found)
    return {"budget_mb": math.ceil(budget.max_weight_bytes / commands.MEGABYTE * 100) / 100, "act_bits": budget.max_mean_act_bits}


def _png(session: Session, image) -> dict:
    """An image as a file that gradio's clients fetch by themselves."""
    path = pictures.write(session, image)
    return {"path": str(path), "orig_name": path.name, "mime_type": "image/png", "meta": {"_type": "gradio.FileData"}}


def _drawn(session: Session, made) -> dict:
    images = [{"prompt": prompt, "seed": seed, "image": _png(session, image)}
              for prompt, seed, image in zip(made.prompts, made.seeds, made.images)]
    return {"images": images, "seconds_per_image": made.seconds_per_image}


def _compared(session: Session, made) -> dict:
    images = [{"prompt": pair.prompt, "seed": pair.seed, "image": _png(session, pair.image_quantized),
               "image_float": _png(session, pair.image_float), "latent_nmse": pair.latent_nmse, "psnr_db": pair.psnr_db, "ssim": pair.ssim}
              for pair in made.pairs]
    return {"images": images, "metrics": {name: vars(interval) for name, interval in made.metrics.items()},
            "seconds_per_image": made.quantized_seconds_per_image, "seconds_per_image_float": made.float_seconds_per_image,
            "weight_bytes": made.quantized_bytes, "float_bytes": made.float_bytes, "compute": f"{made.compute}: {made.reason}"}
