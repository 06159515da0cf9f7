#!/usr/bin/env bash
# One would guess that a scheduler has as many different timesteps as steps, so that a time tells the step. UniPC with flow sigmas rounds its
# times to integers: at 500 steps and a shift of 5 only 415 differ. A pipeline that asks for the step of a time finds the wrong one, and the
# plain loop over `timesteps` ends in an AssertionError of the library itself; `set_begin_index(0)`, which counts calls, runs through.
# It matters here because plans are keyed by the noise level of the table and never by the time the transformer is told.
# diffusers 0.42.1, torch 2.13.0 (CPU). Fails if this changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q diffusers==0.42.1 torch==2.13.0 numpy
"$work/env/bin/python" - <<'PYTHON'
import torch
from diffusers import UniPCMultistepScheduler

STEPS = 500


def walk(counted):
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    scheduler.set_timesteps(STEPS)
    if counted:
        scheduler.set_begin_index(0)
    latent = torch.ones(1, 4, 2, 2)
    try:
        for time in scheduler.timesteps:
            latent = scheduler.step(torch.zeros_like(latent), time, latent, return_dict=False)[0]
    except AssertionError:
        return "AssertionError", scheduler
    return "finite" if bool(torch.isfinite(latent).all()) else "not finite", scheduler


found, scheduler = walk(counted=False)
times, sigmas = scheduler.timesteps, scheduler.sigmas[:-1]
print(f"{len(times)} steps, {len(times.unique())} different times, {len(sigmas.unique())} different noise levels")
print("the plain loop:", found, "| with set_begin_index(0):", walk(counted=True)[0])
assert len(times.unique()) == 415 and len(sigmas.unique()) == STEPS
assert found == "AssertionError" and walk(counted=True)[0] == "finite"
PYTHON
echo "as described: 500 steps, 415 times; the plain loop stops, the counted one does not"
