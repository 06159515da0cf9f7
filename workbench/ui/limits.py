"""What a visitor may ask for, in one place: generous on one's own machine, strict on a public Space."""

from __future__ import annotations

import os
from dataclasses import dataclass

from workbench.options import BadInput
from workbench.prompts import MAX_PROMPTS

SPACE_MODELS = ("emoji-flux",)  # what a Space of this size can hold; hub ids may be added here


@dataclass(frozen=True, kw_only=True)
class Limits:
    """models None: any embedded name, local folder or hub id. A session ends when nobody has looked for idle_minutes; then its
    files are removed, exported checkpoints only where they are not kept for their maker."""

    prompts: int
    steps: int
    compared: int  # prompts of one comparison
    tokens: int  # that one sample brings to a layer
    upload_mb: int
    models: tuple[str, ...] | None
    idle_minutes: int
    waiting: int  # calls over HTTP that may wait in line, all callers together
    keeps_exports: bool

    def check(self, *, prompts: int = 0, steps: int = 0, tokens: int = 0) -> None:
        """Raises BadInput when more is asked for than is allowed here."""
        for asked, allowed, what in ((prompts, self.prompts, "prompts"), (steps, self.steps, "steps"),
                                     (tokens, self.tokens, "tokens of text and image")):
            if asked > allowed:
                raise BadInput(
                    f"{asked} {what} are more than the {allowed} allowed here; use fewer, or run the workbench on your own machine"
                )

    def check_model(self, source: str) -> None:
        """Raises BadInput for a model that may not be loaded here."""
        if self.models is not None and source not in self.models:
            raise BadInput(
                f"only {', '.join(self.models)} can be loaded on this Space, neither folders nor other hub ids; "
                "run the workbench on your own machine for any model"
            )


OWN_MACHINE = Limits(prompts=MAX_PROMPTS, steps=100, compared=16, tokens=1_000_000, upload_mb=10, models=None, idle_minutes=24 * 60,
                     waiting=256, keeps_exports=True)
ON_A_SPACE = Limits(prompts=24, steps=30, compared=8, tokens=1024, upload_mb=2, models=SPACE_MODELS, idle_minutes=45, waiting=32,
                    keeps_exports=False)


def on_a_space() -> bool:
    return bool(os.environ.get("SPACE_ID"))


def here() -> Limits:
    """The limits of the place this process runs in."""
    return ON_A_SPACE if on_a_space() else OWN_MACHINE
