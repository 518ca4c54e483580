"""What a decode step is: its spec, its arguments, and random ones to try kernels on."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

from qoqc.codegen.kernels.attention import has_window, kv_spec_of
from qoqc.codegen.kernels.pieces import check_device
from qoqc.codegen.kernels.pieces_rotary import FORMS
from qoqc.ir.spec import OUTPUT_DTYPES, PAGE, KVSpec
from qoqc.quant.kv import empty_pages


@dataclasses.dataclass(frozen=True)
class StepSpec:
    """A decode step of `heads` query heads over a `kv` cache; ir/ops.py kv4_decode.

    rotated  channels that turn; 0 for the form "none"
    normed   RMSNorm over each head of q and k first, with `offset` and `round_first`
    """

    heads: int
    kv: KVSpec
    dtype: torch.dtype
    form: str = "half"
    rotated: int = 0
    normed: bool = False
    offset: float = 0.0
    round_first: bool = True
    has_mask: bool = False
    has_sinks: bool = False
    has_softcap: bool = False
    has_window: bool = False


@dataclasses.dataclass(frozen=True)
class Step:
    """The arguments of one kv4_decode call, named as in ir/ops.py."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    q_weight: torch.Tensor | None
    k_weight: torch.Tensor | None
    cos: torch.Tensor | None
    sin: torch.Tensor | None
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    kv_words: torch.Tensor
    block_table: torch.Tensor
    length: torch.Tensor
    mask: torch.Tensor | None
    sinks: torch.Tensor | None
    form: str
    eps: float
    offset: float
    round_first: bool
    scale: float
    softcap: float
    bits: Literal[4, 8]
    window: int = 0

    @property
    def batch(self) -> int:
        """Sequences, each with one new token."""
        return self.q.shape[0]


def spec_of(step: Step) -> StepSpec:
    """The spec of a step; ValueError, with the numbers, for what the kernel does not take."""
    q, mask = step.q, step.mask
    kv = kv_spec_of(step.k_pages, step.v_pages, step.kv_words, step.block_table, step.bits)
    check_device(
        "kv4_decode", q=q, k=step.k, v=step.v, q_weight=step.q_weight, k_weight=step.k_weight,
        cos=step.cos, sin=step.sin, k_pages=step.k_pages, block_table=step.block_table,
        length=step.length, mask=mask, sinks=step.sinks,
    )  # fmt: skip
    dtypes = [x.dtype for x in (q, step.k, step.v)]
    if q.dtype not in OUTPUT_DTYPES or len(set(dtypes)) > 1:
        raise ValueError(
            "kv4_decode: q, k and v must have one 16-bit or fp32 floating-point dtype, got "
            + ", ".join(map(str, dtypes))
        )
    batch, heads, seq, k_dim = q.shape
    shapes = tuple(tuple(x.shape) for x in (step.k, step.v))
    wanted = ((batch, kv.kv_heads, 1, kv.k_dim), (batch, kv.kv_heads, 1, kv.v_dim))
    if seq != 1 or k_dim != kv.k_dim or heads % kv.kv_heads or shapes != wanted:
        raise ValueError(
            f"kv4_decode: q {tuple(q.shape)}, k {shapes[0]} and v {shapes[1]} do not fit a cache "
            f"of {kv.kv_heads} heads x {kv.k_dim} and {kv.v_dim} with one new token per sequence"
        )
    if step.length.shape != (batch,) or step.block_table.shape[0] != batch:
        raise ValueError(
            f"kv4_decode: {batch} sequences, but length is {tuple(step.length.shape)} and "
            f"block_table {tuple(step.block_table.shape)}"
        )
    rotated = _rotated(step, k_dim)
    if mask is not None and (
        mask.dtype is not torch.bool
        or mask.dim() != 4
        or mask.shape[0] not in (1, batch)
        or tuple(mask.shape[1:3]) != (1, 1)
    ):
        raise ValueError(
            f"kv4_decode: mask must be bool [B or 1, 1, 1, L] for q {tuple(q.shape)}, got "
            f"{mask.dtype} {tuple(mask.shape)}"
        )
    for name, x, size in (
        ("q_weight", step.q_weight, k_dim), ("k_weight", step.k_weight, k_dim),
        ("sinks", step.sinks, heads),
    ):  # fmt: skip
        if x is not None and (tuple(x.shape) != (size,) or x.stride(0) != 1):
            raise ValueError(f"kv4_decode: {name} is {tuple(x.shape)}, expected ({size},)")
    if (step.q_weight is None) != (step.k_weight is None):
        raise ValueError("kv4_decode: pass q_weight and k_weight, or neither")
    normed = step.q_weight is not None
    return StepSpec(
        heads,
        kv,
        q.dtype,
        step.form if rotated else "none",
        rotated,
        normed,
        step.offset if normed else 0.0,
        step.round_first if normed else True,
        mask is not None,
        step.sinks is not None,
        bool(step.softcap),
        has_window("kv4_decode", step.window),
    )


def _rotated(step: Step, k_dim: int) -> int:
    """How many channels of a head turn."""
    if step.form not in FORMS:
        raise ValueError(f"kv4_decode: form {step.form!r}, expected one of {', '.join(FORMS)}")
    if step.form == "none":
        return 0
    cos, sin = step.cos, step.sin
    if cos is None or sin is None or cos.shape != sin.shape or cos.dim() != 3:
        raise ValueError(f"kv4_decode: form {step.form!r} needs cos and sin [B or 1, 1, R]")
    if cos.shape[0] not in (1, step.batch) or cos.shape[1] != 1:
        raise ValueError(f"kv4_decode: cos {tuple(cos.shape)} for q {tuple(step.q.shape)}")
    rotated = cos.shape[2]
    if rotated > k_dim or rotated % 2:
        raise ValueError(f"kv4_decode: {rotated} of {k_dim} channels turn, expected an even part")
    return rotated


def random_step(spec: StepSpec, batch: int, cached: int, device: torch.device) -> Step:
    """A step with random data after `cached` tokens in each sequence."""
    generator = torch.Generator(device).manual_seed(0)
    kv, per_sequence = spec.kv, cached // PAGE + 1

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(spec.dtype)

    pages = empty_pages(batch * per_sequence, kv.kv_heads, kv.k_dim, kv.v_dim, kv.bits, device)
    for stored in pages[:2]:
        stored.random_(0, 256, generator=generator)
    pages[2].fill_(0x2C00 | (0xB800 << 16) - (1 << 32))  # scale 1/16, low -1/2
    table = torch.randperm(batch * per_sequence, generator=generator, device=device)
    turns = torch.rand(batch, 1, spec.rotated, generator=generator, device=device)
    mask = torch.ones(batch, 1, 1, per_sequence * PAGE, dtype=torch.bool, device=device)
    return Step(
        randn(batch, 1, spec.heads, kv.k_dim).transpose(1, 2),
        randn(batch, 1, kv.kv_heads, kv.k_dim).transpose(1, 2),
        randn(batch, 1, kv.kv_heads, kv.v_dim).transpose(1, 2),
        randn(kv.k_dim) if spec.normed else None,
        randn(kv.k_dim) if spec.normed else None,
        turns.cos() if spec.rotated else None,
        turns.sin() if spec.rotated else None,
        *pages,
        table.view(batch, per_sequence).int(),
        torch.full((batch,), cached, device=device),
        mask if spec.has_mask else None,
        randn(spec.heads) if spec.has_sinks else None,
        spec.form, 1e-6, spec.offset, spec.round_first, kv.k_dim**-0.5,
        30.0 if spec.has_softcap else 0.0, kv.bits, max(1, cached // 3) if spec.has_window else 0,
    )  # fmt: skip
