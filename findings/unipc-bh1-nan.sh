#!/usr/bin/env bash
# One would guess that solver_type only changes how UniPC weighs its steps. With flow sigmas that end at zero, solver "bh1" divides zero by
# zero at the last step and the final latent is NaN, without an error or a warning; "bh2" at the same settings, and "bh1" that ends at
# sigma_min, are finite. It matters here because every sampler is read off by running it: a scheduler has to be checked for finite numbers,
# or a black image is all that a user sees.
# diffusers 0.42.1, torch 2.13.0 (CPU). Fails if this changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q diffusers==0.42.1 torch==2.13.0 numpy
"$work/env/bin/python" - <<'PYTHON'
import torch
from diffusers import UniPCMultistepScheduler


def final(solver, ends_at, steps=6):
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_type=solver,
                                        final_sigmas_type=ends_at)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    latent, finite = torch.randn(1, 4, 8, 8, generator=generator), []
    for time in scheduler.timesteps:
        output = torch.randn(latent.shape, generator=generator)
        latent = scheduler.step(output, time, latent, return_dict=False)[0]
        finite.append(bool(torch.isfinite(latent).all()))
    return finite


seen = {(solver, ends_at): final(solver, ends_at) for solver in ("bh1", "bh2") for ends_at in ("zero", "sigma_min")}
for case, finite in seen.items():
    print(*case, finite)
assert seen["bh1", "zero"] == [True] * 5 + [False], "the last step of bh1 is finite now"
assert all(all(finite) for case, finite in seen.items() if case != ("bh1", "zero")), "another case is not finite any more"
PYTHON
echo "as described: bh1 with flow sigmas to zero ends in NaN, the other three do not"
