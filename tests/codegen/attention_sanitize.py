"""Small launches of the kernels on the KV cache, checked, for compute-sanitizer to watch.

    compute-sanitizer --tool memcheck python tests/codegen/attention_sanitize.py
    compute-sanitizer --tool racecheck python tests/codegen/attention_sanitize.py

Run it once without the sanitizer first: compiling under it takes long.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from qoqc.codegen import dispatch
from qoqc.codegen.build import build
from qoqc.codegen.family import Family
from qoqc.codegen.kernels import attention_hopper, attention_prefill
from qoqc.codegen.kernels.attention import trial_call
from qoqc.codegen.kernels.attention_forms import FORMS
from qoqc.codegen.kernels.attention_hopper import ATTENTION_HOPPER
from qoqc.codegen.kernels.attention_unpack import ATTENTION_UNPACK
from qoqc.codegen.kernels.rotate_append_call import Append, RotateSpec
from qoqc.codegen.kernels.rotate_append_call import random_call as random_append
from qoqc.codegen.kernels.step_spec import StepSpec, random_step
from qoqc.ir import kv_reference
from qoqc.ir.spec import AttentionSpec, KVSpec
from qoqc.quant.kv import fake_quantize_kv
from qoqc.runtime.device import device_key

HEADS, KV, BF16 = 4, KVSpec(2, 64, 64), torch.bfloat16
DEVICE = torch.device("cuda")


def values(x: Any) -> list[Any]:
    """The fields of a frozen dataclass, tensors copied: ops write into some of them."""
    fields = [getattr(x, field.name) for field in dataclasses.fields(x)]
    return [f.clone() if isinstance(f, torch.Tensor) else f for f in fields]


def check(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
    """A kernel that is wrong would not show what the right one does to memory."""
    error = ((got.double() - want.double()).norm() / want.double().norm()).item()
    assert error < 4e-3, f"{name}: relative error {error}"
    print(f"{name}: relative error {error:.1e}", flush=True)


def steps() -> None:
    """Decode steps with one part to a sequence, with parts that meet, and added up apart."""
    for batch, cached, window in (
        (1, 300, False),
        (3, 100, False),
        (40, 70, False),
        (3, 400, True),
    ):
        spec = StepSpec(HEADS, KV, BF16, rotated=64, has_window=window)
        step = random_step(spec, batch, cached, DEVICE)
        want = kv_reference.kv_decode(*values(step))
        check(f"kv4_decode {batch} x {cached}", dispatch.kv4_decode(*values(step)), want)


def attention(form: Family) -> None:
    """A chunk behind a history, with its exact tokens and without, in a form of the kernel."""
    for chunk in (True, False):
        spec = AttentionSpec(HEADS, KV, BF16, has_chunk=chunk, causal=True)
        call = trial_call(spec, 2, 70, 200, DEVICE)
        pages = (call.k_pages, call.v_pages, call.kv_words, call.block_table, call.length)
        want = kv_reference.kv_attention(
            call.q, *pages, None, call.k_chunk, call.v_chunk, call.scale, 4, True
        )
        kernel = build(form, spec, form.heuristic(spec, 70, device_key(DEVICE)))
        if form is ATTENTION_HOPPER:
            tile = ATTENTION_UNPACK.heuristic(spec, 70, device_key(DEVICE))
            got = attention_hopper.launch(build(ATTENTION_UNPACK, spec, tile), kernel, call)
        else:
            got = attention_prefill.launch(kernel, call)
        check(f"{form.name} chunk={chunk}", got, want)


def appends() -> None:
    """One token each, and a chunk that begins and ends within a page."""
    for batch, seq in ((3, 1), (2, 100)):
        call: Append = random_append(
            RotateSpec(HEADS, KV, BF16, rotated=64), batch, seq, DEVICE, cached=70
        )
        want, _ = kv_reference.kv_rotate_append(*values(call))
        got, _ = dispatch.kv4_rotate_append(*values(call))
        check(f"kv4_rotate_append {batch} x {seq}", got, want)
    x = torch.randn(1, 3, 70, 64, device=DEVICE, dtype=BF16)
    check("kv4_round", dispatch.kv4_round(x, 4), fake_quantize_kv(x, 4))


def main() -> None:
    """Launch and compare."""
    steps()
    for form in FORMS:
        if form.refuses(AttentionSpec(HEADS, KV, BF16), device_key(DEVICE)) is None:
            attention(form)
    appends()


if __name__ == "__main__":
    main()
