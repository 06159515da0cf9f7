"""A link that restores model, prompts and plan: `?plan=` and a short text that holds nothing but what the plan decides.

The text is JSON, deflated, in the alphabet of URLs. Costs are not in it: they are computed anew, so a link cannot lie about them.
Version 1 left out settings that had the default of its day, when both grids were symmetric; today every setting of the solving is written.
Versions 1 and 2 named no modulation layers, which had one width, a setting.
"""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field, field_validator

from workbench.options import ACT_BITS, MAX_PROMPT_CHARACTERS, WEIGHT_BITS, BadInput, Frozen, QuantConfig
from workbench.prompts import MAX_PROMPTS

if TYPE_CHECKING:  # plans bring torch, and the page is built before that
    from workbench.plans import BitPlan

CODE_LIMIT = 60_000  # characters; browsers and servers take much less gladly
TEXT_LIMIT_BYTES = 2_000_000  # a link may not unfold into more than this
PROMPTS_LIMIT_BYTES = 4_000  # more prompts than this are left out of a link
VERSION, DEFAULTS_OF_1 = 3, {"weight_grid": "symmetric", "act_grid": "symmetric"}
NO_BITS = "-"  # a layer without activation bits at a step


class Recipe(Frozen):
    """What a link holds. weights: one character per layer, steps: one text per step with one character per layer; a character is the
    place of the width in WEIGHT_BITS or ACT_BITS, or NO_BITS."""

    version: int = Field(default=VERSION, ge=1, le=VERSION)
    model: str = Field(min_length=1, max_length=300)
    model_hash: str = Field(min_length=8, max_length=64)
    prompts: tuple[str, ...] = Field(default=(), max_length=MAX_PROMPTS)
    seed: int = Field(default=0, ge=0, le=2**31 - 1)
    sigmas: tuple[float, ...] = Field(min_length=1, max_length=1000)
    weights: str = Field(min_length=1, max_length=4096)
    steps: tuple[str, ...] = Field(min_length=1, max_length=1000)
    quant: QuantConfig = QuantConfig()

    @field_validator("prompts")
    @classmethod
    def _prompts_are_texts(cls, prompts):
        if any(not p.strip() or len(p) > MAX_PROMPT_CHARACTERS or not p.isprintable() for p in prompts):
            raise ValueError(f"a prompt is empty, longer than {MAX_PROMPT_CHARACTERS} characters or not plain text")
        return prompts


def fits(prompts) -> bool:
    """Are they few and short enough to be in a link?"""
    return sum(len(p.encode()) for p in prompts) <= PROMPTS_LIMIT_BYTES


def encode(plan: BitPlan, source: str, prompts, seed: int) -> str:
    """The text of the link."""
    prompts = tuple(prompts) if fits(prompts) else ()
    recipe = Recipe(
        model=source,
        model_hash=plan.model_hash,
        prompts=prompts,
        seed=seed,
        quant=plan.quant,
        sigmas=tuple(float(str(np.float32(sigma))) for sigma in plan.sigma_T),
        weights="".join(str(WEIGHT_BITS.index(bits)) for bits in plan.weight_bits_L),
        steps=tuple("".join(NO_BITS if bits is None else str(ACT_BITS.index(bits)) for bits in row) for row in plan.act_bits_TL),
    )
    values = recipe.model_dump(mode="json", exclude_defaults=True) | {"version": VERSION, "quant": plan.quant.model_dump(mode="json")}
    text = json.dumps(values, separators=(",", ":"), ensure_ascii=False).encode()
    return base64.urlsafe_b64encode(zlib.compress(text, 9)).decode().rstrip("=")


def decode(code: str) -> Recipe:
    """The recipe of a link's text; raises BadInput in one line for anything that is not one."""
    if not 0 < len(code) <= CODE_LIMIT:
        raise BadInput(f"the link's plan has {len(code):,} characters; one made here has at most {CODE_LIMIT:,}")
    try:
        packed = base64.b64decode(code + "=" * (-len(code) % 4), altchars=b"-_", validate=True)
        unfold = zlib.decompressobj()
        text = unfold.decompress(packed, TEXT_LIMIT_BYTES)
        if unfold.unconsumed_tail or not unfold.eof:
            raise ValueError
        values = json.loads(text)
    except (binascii.Error, zlib.error, ValueError, RecursionError):
        raise BadInput("the link's plan cannot be read; copy the whole link from the Export screen") from None
    values = {"version": 1, **values} if isinstance(values, dict) else {}
    if values.get("version") == 1 and isinstance(values.get("quant", {}), dict):
        values = {**values, "quant": DEFAULTS_OF_1 | values.get("quant", {})}
    return Recipe.parse(values, "the link's plan")


def plan_of(recipe: Recipe, bundle, costs) -> BitPlan:
    """The plan for a loaded model, its costs from `costs`; raises BadInput when it was made for another model."""
    from workbench.plans import BitChoice, make_plan

    if recipe.model_hash != bundle.model_hash:
        raise BadInput(f"the link's plan was made for {recipe.model} {recipe.model_hash}; the model loaded here is {bundle.model_hash}")
    if recipe.version < 3:
        recipe = _with_modulation(recipe, bundle.layers)
    layers = len(bundle.layers)
    if len(recipe.weights) != layers or any(len(row) != layers for row in recipe.steps) or len(recipe.steps) != len(recipe.sigmas):
        raise BadInput(f"the link's plan does not fit the {layers} layers of {bundle.name}")
    try:
        weights = [BitChoice.of(WEIGHT_BITS[int(c)], recipe.quant, layer) for c, layer in zip(recipe.weights, bundle.layers)]
        rows = [[None if c == NO_BITS else ACT_BITS[int(c)] for c in row] for row in recipe.steps]
        sigmas = [float(np.float32(sigma)) for sigma in recipe.sigmas]
        return make_plan(
            layers=bundle.layers,
            sigma_T=sigmas,
            weight_choice_L=weights,
            act_bits_TL=rows,
            costs=costs,
            quant=recipe.quant,
            model_hash=recipe.model_hash,
            method="link",
        )
    except (ValueError, IndexError):
        raise BadInput("the link's plan holds a width that does not exist or noise levels that do not fall") from None


def _with_modulation(recipe: Recipe, layers) -> Recipe:
    """A recipe of an earlier version with the modulation layers at the width that its settings gave them."""
    from workbench.plans import usual_bits

    usual, own = str(WEIGHT_BITS.index(usual_bits(recipe.quant))), sum(layer.has_act_bits for layer in layers)
    if len(recipe.weights) != own or any(len(row) != own for row in recipe.steps):
        return recipe

    def filled(text: str, missing: str) -> str:
        rest = iter(text)
        return "".join(next(rest) if layer.has_act_bits else missing for layer in layers)

    return recipe.model_copy(update={"weights": filled(recipe.weights, usual),
                                     "steps": tuple(filled(row, NO_BITS) for row in recipe.steps)})
