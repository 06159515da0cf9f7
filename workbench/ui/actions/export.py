"""Screen 5: take the plan and the quantized checkpoint away, or bring a plan in."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

from workbench.options import BadInput
from workbench.ui import limits, links, pictures
from workbench.ui.actions.common import bundle_of, choose, chosen_of, need, profile_of
from workbench.ui.actions.compare import quantized_model
from workbench.ui.session import Drafted, Session
from workbench.ui.tables import MB
from workbench.ui.views import export as views
from workbench.zerogpu import stages

PLAN_LIMIT_BYTES = 8_000_000
REOPENS = "packed weights, plan and model card; opens with workbench.load_quantized or adatsq generate FOLDER, not with diffusers alone"
MADE_OF = ("chosen", "profile", "result", "comparison", "cell")  # what tables and report are written from


def export(session: Session) -> None:
    bundle = bundle_of(session)
    profile_of(session)
    scored = chosen_of(session)
    folder = session.folder / "export" / f"{bundle.name}-{scored.plan.plan_id}"

    def work(on_progress):
        model = quantized_model(session, scored, on_progress)
        stages().export(bundle, model, folder)
        archive = shutil.make_archive(str(session.downloads / folder.name), "zip", folder)
        plan_id, made = scored.plan.plan_id, (folder, Path(archive))
        with session.lock:
            session.put("exports", plan_id, made)
            if session.chosen is not None and session.chosen.plan.plan_id == plan_id:
                session.set(exported=made)
                return
            session.notify("export", f"plan {plan_id} was written; choose it again to see its files", "info")

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


def _state(session: Session) -> tuple:
    """What the files are made of."""
    with session.lock:
        return tuple(session.rev[name] for name in MADE_OF)


def current(session: Session, kind: str) -> str | None:
    """The written file of that kind, if it is of the present state."""
    return session.written.get(kind) if session.written and session.written["state"] == _state(session) else None


def downloads(session: Session) -> list[tuple[str, str, Path | None]]:
    """(name, what it is, file or None while there is none) of everything that can be taken away."""
    tables_path, report_path, images_path = (current(session, kind) for kind in ("tables", "report", "images"))
    plan = plan_file(session)
    archive = session.exported[1] if session.exported else None
    rows = [
        ("Checkpoint (zip)", REOPENS, archive),
        ("Plan (JSON)", "weight and activation bits by layer and noise level; can be imported here", plan),
        ("Report (HTML)", "map, front, plan, images and numbers in one page that opens offline", report_path),
        ("Images (PNG, zip)", "every compared prompt, float and quantized, pixel for pixel", images_path),
        ("Tables (CSV, zip)", "plan, sensitivity, front and comparison for a spreadsheet", tables_path),
    ]
    return [(name, what, Path(path) if path else None) for name, what, path in rows]


def write_files(session: Session) -> None:
    """The Export screen is opened: write tables and report of what there is now, off the request."""
    nothing = session.profile is None and session.chosen is None
    if nothing or current(session, "tables") is not None:
        return
    state = _state(session)

    def work():
        from workbench.ui import report

        made = {"state": state, "tables": str(session.downloads / "tables.zip"), "report": str(session.downloads / "report.html")}
        if session.comparison is not None:
            made["images"] = _zip_images(session)
        with zipfile.ZipFile(made["tables"], "w", zipfile.ZIP_DEFLATED) as file:
            for name, text in views.tables(session).items():
                file.writestr(name, text)
        Path(made["report"]).write_text(report.write(session), encoding="utf-8")
        session.set(written=made)

    session.soon("export", work)


def _zip_images(session: Session) -> str:
    """The compared images, numbered as their prompts are, which stand beside them."""
    path, pairs = session.downloads / "images.zip", session.comparison.pairs
    with zipfile.ZipFile(path, "w") as file:  # a PNG is packed already
        for number, pair in enumerate(pairs, 1):
            for side in ("float", "quantized"):
                file.write(pictures.write(session, getattr(pair, f"image_{side}")), f"{number:03d}-{side}.png")
        lines = [f"{number:03d}\tseed {pair.seed}\t{pair.prompt}" for number, pair in enumerate(pairs, 1)]
        file.writestr("prompts.txt", "\n".join(lines) + "\n")
    return str(path)


def link_code(session: Session) -> str:
    """The text of the link that restores the chosen plan, empty without one."""
    if session.chosen is None or session.bundle is None:
        return ""
    return links.encode(session.chosen.plan, session.bundle.source, session.prompts, session.seed)


def import_plan(session: Session, path: str | None) -> None:
    bundle = bundle_of(session)
    file = Path(need(path, "no file was received"))
    if file.stat().st_size > PLAN_LIMIT_BYTES:
        raise BadInput(f"the plan file has {file.stat().st_size / MB:.1f} MB; a plan has less than {PLAN_LIMIT_BYTES / MB:.0f} MB")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise BadInput("the plan file is not UTF-8 text; a plan is the JSON that this screen exports") from None
    try:
        plan = stages().validate_plan(bundle, text)
    except BadInput as error:
        raise BadInput(f"{error}; import a file that this screen exported for the same model") from None
    choose(session, Drafted(plan))
    write_files(session)
    session.notify("export", f"plan {plan.plan_id} ({plan.method}) was read and is now the chosen plan", "info")


# A link


def follow_link(session: Session, code: str) -> None:
    """The page was opened with `?plan=`: restore what the link holds, now or when its model has been loaded. Once per session."""
    if not code or session.followed == code:
        return
    session.followed = code
    try:
        recipe = links.decode(code)
        limits.here().check_model(recipe.model)
        session.restoring = recipe
        if session.bundle is not None and session.bundle.source == recipe.model:
            restore(session)
        elif recipe.model != session.source:
            _load(session, recipe.model)
    except BadInput as error:
        session.restoring = None
        session.notify("export", str(error))
        session.notify("model", str(error))


def _load(session: Session, source: str) -> None:
    def work(on_progress):
        session.adopt(stages().load(source, on_progress=on_progress))

    session.submit("load", "model", work)


def restore(session: Session) -> None:
    """Apply the waiting recipe to the loaded model."""
    from workbench import costs

    recipe, bundle = session.restoring, session.bundle
    if recipe is None or bundle is None or bundle.source != recipe.model:
        return
    session.restoring = None
    try:
        plan = links.plan_of(recipe, bundle, costs.tabulate(bundle, recipe.quant))
    except BadInput as error:
        session.notify("model", str(error))
        return
    session.steps, session.seed = len(recipe.sigmas), recipe.seed
    session.set(steps=len(recipe.sigmas), seed=recipe.seed, prompts=recipe.prompts or session.prompts)
    choose(session, Drafted(plan, origin="link"))
    session.notify("model", f"the link's plan {plan.plan_id} is now the chosen plan; profile the model to draw with it", "info")
