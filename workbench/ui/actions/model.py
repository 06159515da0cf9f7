"""Screen 1: which model, which prompts."""

from __future__ import annotations

from pathlib import Path

from workbench import model_info
from workbench.options import BadInput, GenerationConfig, ModelSpec, TraceConfig
from workbench.prompts import check, read
from workbench.ui import inputs, limits
from workbench.ui.actions.common import bundle_of, need
from workbench.ui.session import SHOWN_PROMPTS, Session
from workbench.zerogpu import stages

SOURCE_LIMIT = 1000
GENERATION_INPUTS = tuple(GenerationConfig.model_fields)  # the negative prompt last


def source_of(source: str | None) -> str:
    """A model's name, if it is one and may be loaded here; raises BadInput."""
    source = (source or "").strip()
    if not 0 < len(source) <= SOURCE_LIMIT:
        raise BadInput(f"a model is named by 1 to {SOURCE_LIMIT} characters, not {len(source)}: an embedded name, a folder or a hub id")
    limits.here().check_model(source)
    return ModelSpec.parse({"source": source}, "model").source


def load_model(session: Session, source: str | None) -> None:
    source = source_of(source)
    known = model_info.of(source)
    model_info.require_room(known)

    def work(on_progress):
        if _only_on_hub(known):
            model_info.require_room(model_info.on_hub(source))
        session.adopt(stages().load(source, on_progress=on_progress))

    session.submit("load", "model", work)


def look_at_model(session: Session, source: str | None) -> None:
    """Another model was named: say how large it is before anything is loaded."""
    source = source_of(source)
    known = model_info.of(source)
    session.set(model_info=known, source=source)

    def ask():
        found = model_info.on_hub(source)
        if session.source == source:
            session.set(model_info=found)

    if _only_on_hub(known):
        session.soon("model", ask)


def generate_as(session: Session, *values) -> None:
    """Set what the model generates: size, guidance, text length. What was found for other sizes is forgotten."""
    asked = inputs.read(GenerationConfig, GENERATION_INPUTS, [None if value == "" else value for value in values[:-1]] + [values[-1] or ""])
    session.require_idle()
    bundle = bundle_of(session)
    changed = bundle.at(asked)
    limits.here().check(tokens=changed.tokens)
    if changed is not bundle:
        session.adopt(changed)
    session.notify("model", f"generates with {asked.words}", "info")


def _only_on_hub(known: model_info.ModelInfo) -> bool:
    return known.kind == "hub id" and known.parameters is None


def pick_model(session: Session, payload) -> None:
    """A card of an embedded model."""
    names = model_info.embedded()
    name = payload.get("model") if isinstance(payload, dict) else None
    if name in names and (session.bundle is None or session.bundle.source != name):
        session.set(source=name, model_info=model_info.of(name))
        load_model(session, name)


def keep_prompts(session: Session, rows) -> None:
    given = inputs.prompts(rows)
    TraceConfig.parse({"prompts": given}, "prompts")
    session.prompts = given  # drawn again only after a reload: the table already shows it


def default_prompts(session: Session) -> None:
    session.set(prompts=bundle_of(session).prompts("calibration")[:SHOWN_PROMPTS])


def upload_prompts(session: Session, path: str | None) -> None:
    found = read(Path(need(path, "no file was received")))
    limits.here().check(prompts=len(found))
    session.set(prompts=check(found))
    session.notify("model", "1 prompt was read" if len(found) == 1 else f"{len(found)} prompts were read", "info")
