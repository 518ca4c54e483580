"""The half of `qoqc doctor` that needs torch and Triton: GPUs, and what will run on which."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import triton
from rich.filesize import decimal

from qoqc.cli.doctor import Check, Run
from qoqc.codegen.build import OPS
from qoqc.codegen.kernels.attention_forms import faster_than_flash
from qoqc.codegen.tuning.choose import known
from qoqc.codegen.tuning.table import look_up
from qoqc.ir.spec import AttentionSpec, KVSpec, LinearSpec
from qoqc.runtime.device import DeviceKey, device_key

MIN_ARCH = 80
"""The oldest compute capability with what the kernels use: bfloat16 and int8 MMA of depth 32."""

KNOWN_ARCHS = (80, 86, 89, 90)
"""Those that qoqc is made for; later ones run the plain forms."""

TOKENS = (1, 16, 512)
"""Decode, a small batch, prefill."""

FORMATS: tuple[tuple[Literal[128, -1], str], ...] = ((128, "g128"), (-1, "per channel"))

SHAPE = (4096, 4096)
"""N and K of the linear that stands for others; forms differ by device and tokens, rarely by it."""

HEADS = AttentionSpec(32, KVSpec(8, 128, 128), torch.bfloat16, causal=True)
"""Attention that stands for other models'."""

SPECIAL = {
    "a mask": dataclasses.replace(HEADS, has_mask=True),
    "a window": dataclasses.replace(HEADS, has_window=True),
    "a soft cap": dataclasses.replace(HEADS, has_softcap=True),
    "sinks": dataclasses.replace(HEADS, has_sinks=True),
    "8 bits": dataclasses.replace(HEADS, kv=dataclasses.replace(HEADS.kv, bits=8)),
}
"""What not every form takes."""

SINGLE_FORMS = (
    ("quantize", "quantize", "its only form"),
    ("rotate, append", "kv_rotate_append", "its only form; kv_append of keys that are turned"),
    (
        "decode step",
        "step_attend, step_combine",
        "rotation, append and attention; the second for few sequences only",
    ),
    ("few queries over pages", "attention_decode, attention_combine", "their only forms"),
)
"""Work, kernels and why, the same on all GPUs."""


def checks() -> list[Check]:
    """torch's CUDA build, the driver and every GPU."""
    build, driver = torch.version.cuda, driver_version()
    if torch.cuda.is_available():
        cuda = Check("CUDA", f"torch for CUDA {build}, driver {driver or 'unknown'}", "ok")
        return [cuda, *(_gpu(index) for index in range(torch.cuda.device_count()))]
    if driver is None:
        return [Check("GPU", "none", "note", "models run on the CPU")]
    if build is None:
        remedy = "this torch is a CPU build; install one for CUDA to use the GPU"
        return [Check("GPU", f"not used, driver {driver}", "problem", remedy)]
    remedy = "torch cannot use it: is CUDA_VISIBLE_DEVICES set, or the driver too old?"
    return [Check("GPU", f"torch for CUDA {build}, driver {driver}", "problem", remedy)]


def _gpu(index: int) -> Check:
    key = device_key(torch.device("cuda", index))
    free, total = torch.cuda.mem_get_info(index)
    found = (
        f"{key.name}, sm_{key.arch}, {key.sm_count} SMs, {decimal(free)} of {decimal(total)} free"
    )
    name = f"cuda:{index}"
    if key.arch < MIN_ARCH:
        remedy = f"the kernels need sm_{MIN_ARCH} or later; use --device cpu"
        return Check(name, found, "problem", remedy)
    if key.arch not in KNOWN_ARCHS:
        remedy = "runs the plain kernels; nobody has measured qoqc on it"
        return Check(name, found, "note", remedy)
    return Check(name, found, "ok")


def driver_version(call: Callable[..., Any] = subprocess.run) -> str | None:
    """The NVIDIA driver's version as nvidia-smi has it; None if there is none to ask."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = call(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.split() if done.returncode == 0 else []
    return lines[0] if lines else None


def runs() -> list[Run]:
    """For every device what its GEMMs, attention and quantization run in."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    lines = []
    for index in range(count):
        key = device_key(torch.device("cuda", index))
        if key.arch >= MIN_ARCH:
            lines += list(gpu_runs(f"cuda:{index}", key))
    return [*lines, *_cpu_runs()]


def gpu_runs(name: str, key: DeviceKey) -> Iterator[Run]:
    """The lines of a GPU: per format and number of tokens the form that would be launched."""
    op, (n, k) = OPS["w4a8_linear"], SHAPE
    for group_size, kind in FORMATS:
        spec = LinearSpec(k, n, group_size, torch.bfloat16)
        refused = [(form.name, form.refuses(spec, key)) for form in op.forms]
        reasons = [f"{form}: {reason}" for form, reason in refused if reason is not None]
        for tokens in TOKENS:
            form, _ = known(op, spec, tokens, key)
            source = "heuristic" if look_up(op, spec, tokens, key) is None else "tuning table"
            work = f"linear {kind}, {tokens} token{'' if tokens == 1 else 's'}"
            yield Run(name, work, form.name, "; ".join([f"by {source}", *reasons]))
    for work, kernels, why in SINGLE_FORMS:
        yield Run(name, work, kernels, why)
    yield _many_queries(name, key)
    served = "from its pages" if faster_than_flash(HEADS, key) else "rounded, by flash attention"
    why = f"by generate(), but for soft caps and sinks: those over pages; by qoqc serve {served}"
    yield Run(name, "a prompt's first chunk", "torch's SDPA", why)


def _many_queries(name: str, key: DeviceKey) -> Run:
    """The form that plain attention takes, why not another, and what has another."""
    op, tokens = OPS["attention_prefill"], TOKENS[-1]
    form, _ = known(op, HEADS, tokens, key)
    source = "heuristic" if look_up(op, HEADS, tokens, key) is None else "tuning table"
    reasons = [f"by {source}"]
    refused = [(other.name, other.refuses(HEADS, key)) for other in op.forms]
    reasons += [f"{other}: {reason}" for other, reason in refused if reason is not None]
    taken = {kind: known(op, spec, tokens, key)[0].name for kind, spec in SPECIAL.items()}
    for other in sorted({*taken.values()} - {form.name}):
        kinds = ", ".join(kind for kind, its in taken.items() if its == other)
        reasons.append(f"{other} with {kinds}")
    return Run(name, "many queries over pages", form.name, "; ".join(reasons))


def _cpu_runs() -> Iterator[Run]:
    threads = torch.get_num_threads()
    capability = torch.backends.cpu.get_cpu_capability()
    why = f"{capability}, {threads} threads; 4-bit weights are expanded once, to twice their size"
    yield Run("cpu", "linear", "torch._int_mm", why)
    why = "no kernels are generated for CPUs"
    if triton.knobs.runtime.interpret:
        why += "; Triton's interpreter runs those for CUDA in tests only"
    yield Run("cpu", "quantize, KV cache, attention", "torch, through Inductor", why)
