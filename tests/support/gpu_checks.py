"""Every GPU kernel against float64 on the CPU, with a bound from the arithmetic; needs torch alone, no pytest.

python tests/support/gpu_checks.py cuda ROWS             the CUDA kernels, on the GPU; a line of JSON a check
python tests/support/gpu_checks.py triton ROWS           the Triton kernels, and what runs on a GPU as plain PyTorch
python tests/support/gpu_checks.py sanitized ROWS        one small case of each kernel, for compute-sanitizer
... --cpu      the same by the interpreter (TRITON_INTERPRET=1), and by the CUDA sources run on the host

New memory is filled with NaN, so that an output which no kernel wrote shows; not for a sanitizer, to which it would be
initialised then.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from draws import BF16, DTYPES, F16, F32, F64
from gpu_cases import (
    LAYERS,
    Shares,
    adaptive_step,
    compensated_step,
    layer_bits,
    mixed_list,
    momentum_step,
    network_norms,
    per_sample_bits,
    per_sample_step,
    replicas_step,
    same_bits,
    scaled_step,
    step,
    step_bits,
    weight_grad,
    weight_grad_halves,
    weight_step,
)

from svag_fast.ops.backends import BACKENDS

STEP_KERNELS = {"cuda": ("step_kernel", "finish_kernel"), "triton": ("_step_kernel", "_finish_kernel")}
REPLICAS_KERNELS = {
    "cuda": ("replicas_step_kernel", "replicas_finish_kernel", *STEP_KERNELS["cuda"]),
    "triton": STEP_KERNELS["triton"],
}
SCALED_KERNELS = {"cuda": ("scaled_step_kernel", "finish_kernel"), "triton": STEP_KERNELS["triton"]}
PER_SAMPLE_KERNELS = ("per_sample_step_kernel", "finish_norms_kernel", "finish_kernel")
LAYER_KERNELS = ("_weight_grad_kernel", "_finish_layer_kernel")


@dataclass(frozen=True)
class Check:
    """One case of one op by one backend; ``small`` for a sanitizer, ``dry`` where a CPU needs no minutes for it."""

    op: str
    backend: str
    case: str
    run: Callable[[torch.device], Shares]
    kernels: tuple[str, ...] = ()
    small: bool = False
    dry: bool = False


def name_of(dtypes: tuple[torch.dtype, ...]) -> str:
    return " and ".join(str(d).removeprefix("torch.") for d in dict.fromkeys(dtypes))


def checks() -> list[Check]:
    """All of them, each kernel's plainest case first."""
    found: list[Check] = []
    for b, kernels in STEP_KERNELS.items():
        add = partial(Check, "svag_step_", b, kernels=kernels)
        for dtypes in DTYPES:
            for l in (4, 1, 65536):
                plain = dtypes == (F32, F32) and l == 4
                run = partial(step, backend=b, dtypes=dtypes, l=l)
                found.append(add(f"{name_of(dtypes)}, l = {l}", run, small=plain, dry=l == 4))
        found += [
            add("one gradient", partial(step, backend=b, dtypes=(F32, F32), l=1, second=False), dry=True),
            add("squares beyond float32", partial(step, backend=b, dtypes=(F32, F32), l=2, scale=1e25), dry=True),
            add("9 million", partial(step, backend=b, dtypes=(F32, F32), l=4, shapes=[(9_000_001,), (4096,)])),
            add("compensated", partial(compensated_step, backend=b, dtype=F32, bad=None), small=True, dry=True),
            add("compensated, bfloat16", partial(compensated_step, backend=b, dtype=BF16, bad=None)),
            add("an inf is skipped", partial(compensated_step, backend=b, dtype=F32, bad=math.inf), dry=True),
            add("a nan is skipped", partial(compensated_step, backend=b, dtype=F32, bad=math.nan)),
            *(
                add(
                    f"momentum, {name_of(dtypes)}, l = {l}",
                    partial(momentum_step, backend=b, dtypes=dtypes, l=l),
                    small=dtypes == (F32, F32) and l == 4,
                    dry=dtypes == (F32, F32) and l == 4,
                )
                for dtypes in DTYPES
                for l in (4, 1, 65536)
            ),
            add("momentum, fixed", partial(momentum_step, backend=b, dtypes=(F32, F32), l=4, rule="fixed")),
            add("momentum, an inf is skipped", partial(momentum_step, backend=b, dtypes=(F32, F32), l=4, bad=math.inf)),
            *(
                add(
                    f"under a scaler, {name_of(dtypes)}",
                    partial(scaled_step, backend=b, dtypes=dtypes, found_inf=False),
                    kernels=SCALED_KERNELS[b],
                )
                for dtypes in ((F32, F32), (F64, F64), (BF16, BF16))
            ),
            add(
                "under a scaler that found an inf",
                partial(scaled_step, backend=b, dtypes=(F32, F32), found_inf=True),
                kernels=SCALED_KERNELS[b],
                small=True,
                dry=True,
            ),
            add("500 tensors, mixed and unaligned", partial(mixed_list, backend=b, count=500)),
            add("the same bits", partial(same_bits, call=partial(step_bits, b))),
        ]
    for b, kernels in REPLICAS_KERNELS.items():
        for dtypes in ((F32, F32), (F64, F64), (BF16, F32)):
            run = partial(replicas_step, backend=b, dtypes=dtypes)
            plain = dtypes == (F32, F32)
            found.append(Check("svag_replicas_step_", b, name_of(dtypes), run, kernels, small=plain, dry=plain))
    add = partial(Check, "svag_step_per_sample_", "cuda", kernels=PER_SAMPLE_KERNELS)
    for dtype in (F32, F64, BF16, F16):
        for samples, l in (((5, 33), 4), ((1, 1), 2), ((34, 3), 65536), ((4, None), 1)):
            name = f"{str(dtype).removeprefix('torch.')}, {samples[0]} and {samples[1] or 'no'} samples, l = {l}"
            plain = dtype == F32 and samples == (5, 33)
            run = partial(per_sample_step, dtype=dtype, samples=samples, l=l)
            found.append(add(name, run, small=plain, dry=samples == (5, 33)))
    found.append(add("the same bits", partial(same_bits, call=per_sample_bits)))
    found += _layer_checks()
    for dtype in (F32, F64):
        for adam in (True, False):
            name = f"{'Adam' if adam else 'RMSprop'}, {str(dtype).removeprefix('torch.')}"
            run = partial(adaptive_step, dtype=dtype, adam=adam)
            found.append(Check("svag_adaptive_step_", "auto", name, run, dry=True))
    found.append(Check("per_sample_sq_norms", "auto", "a network", network_norms, LAYER_KERNELS, dry=True))
    return found


def _layer_checks() -> list[Check]:
    add = partial(Check, "weight_grad_and_sq_norms", "triton", kernels=LAYER_KERNELS)
    some = ["3x3", "linear, rows", "stride 2", "groups", "many chunks", "one chunk"]
    found = []
    for case in [*some, *(c for c in LAYERS if c not in some)]:
        small = case in ("3x3", "linear, rows", "groups")
        dry = case in ("3x3", "linear, rows", "no samples", "1x1 stride 2")
        found.append(add(case, partial(weight_grad, case=case), small=small, dry=dry))
        if len(LAYERS[case][1]) == 4:
            run = partial(weight_grad, case=case, channels_last=True)
            found.append(add(f"{case}, channels_last", run, dry=case == "3x3"))
    for case in some:
        found.append(add(f"{case}, tf32", partial(weight_grad, case=case, precision="tf32")))
        found.append(
            add(f"{case}, 3 segments", partial(weight_grad, case=case, segments=3), dry=case == "linear, rows")
        )
        for dtype in (BF16, F16):
            name = f"{case}, {str(dtype).removeprefix('torch.')}"
            run = partial(weight_grad, case=case, dtype=dtype)
            found.append(add(name, run, dry=case == "linear, rows"))
    for case in some:
        small = case in ("linear, rows", "many chunks")
        found.append(add(f"{case}, two halves", partial(weight_grad_halves, case=case), small=small, dry=small))
    found.append(
        add(
            "3x3, channels_last, tf32, two halves",
            partial(weight_grad_halves, case="3x3", precision="tf32", channels_last=True),
        )
    )
    for case in ("many chunks", "one chunk"):
        found.append(add(f"{case}, the same bits", partial(same_bits, call=partial(layer_bits, case))))
    add = partial(Check, "svag_weight_step_", "triton", kernels=LAYER_KERNELS)
    for dtype in (F32, BF16, F16):
        for case in some:
            for l in (4, 1, 1e6):
                name = f"{case}, {str(dtype).removeprefix('torch.')}, l = {l:g}"
                plain = dtype == F32 and l == 4
                run = partial(weight_step, case=case, dtype=dtype, l=l)
                small = plain and case in ("3x3", "many chunks")
                found.append(add(name, run, small=small, dry=plain and case in ("3x3", "linear, rows")))
    return found


def outcome(check: Check, device: torch.device, why_unavailable: str | None) -> dict[str, Any]:
    """Run a check and say what came of it; ``worst`` is the largest error as a share of its bound."""
    row: dict[str, Any] = {"kernel": f"{check.op}, {check.backend}", "case": check.case, "kernels": check.kernels}
    if why_unavailable is not None:
        return row | {"status": "skipped", "why": why_unavailable}
    try:
        shares = dict(check.run(device))
    except Exception as error:
        return row | {"status": "failed", "why": f"{type(error).__name__}: {str(error)[:500]}"}
    worst = max(shares.values(), default=math.inf)
    wrong = [f"{name}: off by {value:.3g} times the bound" for name, value in shares.items() if not value <= 1]
    shown = worst if math.isfinite(worst) else None  # JSON has no inf
    return row | {"status": "wrong" if wrong else "ok", "worst": shown, "why": "; ".join(wrong)}


def on_host(backend: str) -> AbstractContextManager[None]:
    """On a CPU the CUDA sources themselves run on the host, checked for races as they do, if svag_fast was built."""
    if backend != "cuda" or BACKENDS["cpu"].why_unavailable():
        return contextlib.nullcontext()
    from cuda_on_host.backend import cuda_on_host, load

    kernels = load("race", Path(__file__).parents[2] / ".pytest_cache" / "d" / "cuda_on_host")
    kernels.set_order("shuffled", seed=1)
    return cuda_on_host(kernels)


def run(which: str, rows: Path, device: torch.device, share: slice) -> bool:
    """Run a share of the checks, and append a line for each as it is done; say whether none is wrong."""
    sanitized = which == "sanitized"
    backends = {"cuda": ["cuda"], "triton": ["triton", "auto"], "sanitized": ["cuda", "triton"]}[which]
    found: list[dict[str, Any]] = []
    for backend in backends:
        chosen = [c for c in checks() if c.backend == backend and (c.small or not sanitized)]
        chosen = [c for c in chosen if c.dry or device.type == "cuda"][share]
        with on_host(backend) if device.type == "cpu" else contextlib.nullcontext():
            reason = BACKENDS[backend].why_unavailable() if backend != "auto" else None
            for check in chosen:
                found.append(outcome(check, device, reason))
                with rows.open("a") as file:  # one write each: other processes append too
                    file.write(json.dumps(found[-1]) + "\n")
    for row in found:
        if row["status"] != "ok":
            print(f"{row['status']}: {row['kernel']}: {row['case']}: {row['why']}")
    print(f"{sum(row['status'] == 'ok' for row in found)} of {len(found)} checks within their bounds")
    return not any(row["status"] in ("wrong", "failed") for row in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=["cuda", "triton", "sanitized"])
    parser.add_argument("rows", type=Path, help="a line is appended for each check, as it is done")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the checks: compiling takes the time")
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--step", type=int, default=1, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.jobs > 1:
        common = [sys.executable, *sys.argv, "--jobs", "1", "--step", str(arguments.jobs), "--first"]
        jobs = [subprocess.Popen([*common, str(i)]) for i in range(arguments.jobs)]
        codes = [job.wait() for job in jobs]
        print(f"exit status of the {len(codes)} processes: {', '.join(map(str, codes))}")
        sys.exit(max(map(abs, codes)))
    if arguments.which != "sanitized":
        torch.utils.deterministic.fill_uninitialized_memory = True
        torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_num_threads(1)
    device = torch.device("cpu" if arguments.cpu else "cuda")
    sys.exit(not run(arguments.which, arguments.rows, device, slice(arguments.first, None, arguments.step)))


if __name__ == "__main__":
    main()
