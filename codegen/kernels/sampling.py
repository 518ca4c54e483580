"""Scores of a sampling step: temperature, nucleus and Gumbel noise, as ir/sampling.sample_scores.

scores fp32 [R, V] -> out fp32 [R, V], R rows of a vocabulary of V tokens. One kernel, launched
once per step of the work; a program has PART tokens of a row, and reads what the programs of its
row left in the launch before:

    step 0        out = scores / temperature; the largest score of each part
    steps 1 to 5  sums of exp over the tokens that reach each of 15 thresholds, evenly spaced in
                  what the step before left of the 2**20: four halvings of the definition's 20
    step 6        out = scores / temperature, `fill` below the threshold, + noise

Rows with top_p 1 do nothing before step 6, which is alone where there is no top_p. How a row is
cut does not depend on the other rows, so nor do its bits. Sums are added in another order than
torch's and exp ends in other bits, so the threshold may lie elsewhere by what that makes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qoqc.codegen.facts import by_facts
from qoqc.codegen.family import Family, Launch, Tile, Trial
from qoqc.codegen.kernels.pieces import check_device, depends_on
from qoqc.codegen.kernels.sampling_selfcheck import SELFCHECK
from qoqc.ir.sampling import FLOOR, HALVINGS
from qoqc.quant.pack import ceil_div
from qoqc.runtime.device import DeviceKey

BITS = 4
"""Halvings per launch. More sums per launch would be fewer launches, but more arithmetic: 15 sums
are 40 instructions per token, which takes an H200 about as long as to read it from memory."""

STEPS = tl.constexpr(HALVINGS // BITS)
DIGIT = tl.constexpr(BITS)
SLOTS = tl.constexpr(1 << BITS)  # the sum over all tokens, then those of the 15 thresholds
DEPTH = tl.constexpr(HALVINGS)
LOWEST = tl.constexpr(FLOOR)
GRID = tl.constexpr(-FLOOR / 2**HALVINGS)  # exact in fp32, and so are its multiples

AHEAD = tl.constexpr(3)  # loads on their way, where a loop is a read from memory and little more

PART = 8192
"""Tokens of a program: 16 programs for Llama-3's vocabulary, also where there is but one row."""

COLUMNS = 512
"""Tokens at a time: one 16-byte load for each of 128 threads."""


@dataclasses.dataclass(frozen=True)
class SampleSpec:
    """Rows of `vocabulary` scores, and which of the three steps they take."""

    vocabulary: int
    has_temperature: bool = False
    has_top_p: bool = False
    has_key: bool = False


@dataclasses.dataclass(frozen=True)
class SampleCall:
    """A call that was checked: scores contiguous, a stand-in for each tensor that is not given."""

    spec: SampleSpec
    scores: torch.Tensor
    temperature: torch.Tensor
    top_p: torch.Tensor
    key: torch.Tensor
    fill: float


@triton.jit
def larger(a, b):
    """The larger of two; NaN if one is NaN, as torch.amax has it."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def top_of(top_ptr, row, PARTS: tl.constexpr, BLOCK_P: tl.constexpr):
    """The largest score of a row."""
    part = tl.arange(0, BLOCK_P)
    tops = tl.load(top_ptr + row * PARTS + part, mask=part < PARTS, other=-float("inf"))
    return tl.reduce(tops, 0, larger)


@triton.jit
def base_of(base_ptr, sums_ptr, top_p, row, rows, step, PARTS: tl.constexpr, BLOCK_P: tl.constexpr):
    """Where the thresholds of `step` begin, in steps of GRID: from the sums of the step before."""
    base = 0
    if step > 1:
        part = tl.arange(0, BLOCK_P)
        slot = tl.arange(0, SLOTS)
        at = (((step - 2) * rows + row) * PARTS + part) * SLOTS
        inside = (part < PARTS)[:, None]
        sums = tl.sum(tl.load(sums_ptr + at[:, None] + slot[None, :], mask=inside, other=0.0), 0)
        enough = top_p * tl.sum(tl.where(slot == 0, sums, 0.0), 0)
        reached = tl.sum(((slot > 0) & (sums >= enough)).to(tl.int32), 0)
        before = tl.load(base_ptr + (step - 2) * rows + row)
        base = before + (reached << (DEPTH - DIGIT * (step - 1)))
    return base


@triton.jit
def mix(x):
    """MurmurHash3's finalizer of int32 x: see ir/sampling.py for the masks."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * -2048144789
    x = x ^ ((x >> 13) & 0x7FFFF)
    x = x * -1028477387
    return x ^ ((x >> 16) & 0xFFFF)


@triton.jit
def gumbel_noise(key, token):
    """Standard Gumbel noise of an int32 key and int32 token ids, fp32."""
    bits = mix(mix(token * -1640531535) ^ key)
    uniform = ((bits & 0x7FFFFFFF).to(tl.float32) + 0.5) * 4.656612873077393e-10  # 2**-31
    rest = 1.0 - tl.minimum(uniform, 0.99999994)  # at most 1 - 2**-24
    # log1p(-uniform): what was lost in rounding `rest` is the quotient's to make good
    exact = tl.log(rest) * (uniform / (1.0 - rest))
    return -tl.log(tl.where(rest == 1.0, uniform, -exact))


@triton.jit
def search(
    scores_ptr,
    out_ptr,
    top_ptr,
    base_ptr,
    sums_ptr,
    temperature,
    top_p,
    row,
    rows,
    part,
    step,
    V: tl.constexpr,
    PARTS: tl.constexpr,
    SCALE: tl.constexpr,
    PART: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Step 0 to STEPS for one part of a row: its largest score, or its sums."""
    column = part * PART + tl.arange(0, COLUMNS)
    begin = row * V
    if step == 0:
        tops = tl.full((COLUMNS,), -float("inf"), dtype=tl.float32)
        for start in tl.range(0, PART, COLUMNS, num_stages=AHEAD):
            token = start + column
            x = tl.load(scores_ptr + begin + token, mask=token < V, other=-float("inf"))
            if SCALE:
                x = tl.div_rn(x, temperature)
                tl.store(out_ptr + begin + token, x, mask=token < V)
            tops = larger(tops, x)
        tl.store(top_ptr + row * PARTS + part, tl.reduce(tops, 0, larger))
    else:
        top = top_of(top_ptr, row, PARTS, BLOCK_P)
        base = base_of(base_ptr, sums_ptr, top_p, row, rows, step, PARTS, BLOCK_P)
        slot = tl.arange(0, SLOTS)
        threshold = LOWEST + GRID * (base + (slot << (DEPTH - DIGIT * step))).to(tl.float32)
        threshold = tl.where(slot == 0, -float("inf"), threshold)
        sums = tl.zeros((SLOTS, COLUMNS), dtype=tl.float32)
        scaled_ptr = out_ptr if SCALE else scores_ptr
        for start in tl.range(0, PART, COLUMNS, num_stages=AHEAD):
            token = start + column
            x = tl.load(scaled_ptr + begin + token, mask=token < V, other=-float("inf"))
            relative = x - top
            # as factors: a comparison and an fma per sum, where selects take one more
            reached = tl.where(relative[None, :] < threshold[:, None], 0.0, 1.0)
            sums = tl.fma(reached, tl.exp(relative)[None, :], sums)
        at = (((step - 1) * rows + row) * PARTS + part) * SLOTS
        tl.store(sums_ptr + at + slot, tl.sum(sums, 1))
        if part == 0:
            tl.store(base_ptr + (step - 1) * rows + row, base)


@triton.jit(do_not_specialize=["rows", "step"])
def sample_kernel(
    scores_ptr,  # [R, V]
    temperature_ptr,  # [R]
    top_p_ptr,  # [R]
    key_ptr,  # [R] int32
    out_ptr,  # [R, V]
    top_ptr,  # [R, PARTS] the largest of each part
    base_ptr,  # [STEPS, R] int32
    sums_ptr,  # [STEPS, R, PARTS, SLOTS]
    fill,
    rows,
    step,
    V: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    HAS_KEY: tl.constexpr,
    PART: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One step for part pid % PARTS of row pid // PARTS."""
    tl.static_assert(PARTS * PART >= V, "parts cover the vocabulary")
    if DEPENDENT:
        # the next step's programs may be there when this one ends: they wait for its results
        gdc_launch_dependents()
        gdc_wait()
    row = (tl.program_id(0) // PARTS).to(tl.int64)
    part = tl.program_id(0) % PARTS
    temperature = 1.0
    if HAS_TEMPERATURE:
        temperature = tl.load(temperature_ptr + row)
    top_p = 1.0
    if HAS_TOP_P:
        top_p = tl.load(top_p_ptr + row)
    if step > STEPS:
        key = 0
        if HAS_KEY:
            key = tl.load(key_ptr + row)
        low = -float("inf")
        top = 0.0
        if top_p < 1.0:
            base = base_of(base_ptr, sums_ptr, top_p, row, rows, step, PARTS, BLOCK_P)
            low = LOWEST + base.to(tl.float32) * GRID
            top = top_of(top_ptr, row, PARTS, BLOCK_P)
        begin = row * V
        column = part * PART + tl.arange(0, COLUMNS)
        for start in tl.range(0, PART, COLUMNS, num_stages=AHEAD):
            token = start + column
            x = tl.load(scores_ptr + begin + token, mask=token < V, other=0.0)
            if HAS_TEMPERATURE:
                x = tl.div_rn(x, temperature)
            if HAS_TOP_P:
                x = tl.where(x - top < low, fill, x)
            if key != 0:
                x += gumbel_noise(key, token)
            tl.store(out_ptr + begin + token, x, mask=token < V)
    elif top_p < 1.0:
        search(
            scores_ptr, out_ptr, top_ptr, base_ptr, sums_ptr, temperature, top_p, row, rows, part,
            step, V, PARTS, HAS_TEMPERATURE, PART, COLUMNS, BLOCK_P,
        )  # fmt: skip


def launch(kernel: Launch, call: SampleCall) -> torch.Tensor:
    """The output of qoqc::sample_scores for a call that `call_of` made."""
    spec, tile, scores = call.spec, kernel.tile, call.scores
    out = torch.empty_like(scores)
    if not out.numel():
        return out
    rows = scores.shape[0]
    parts = ceil_div(spec.vocabulary, tile["PART"])
    steps, slots = STEPS.value, SLOTS.value
    held = rows if spec.has_top_p else 0
    top = scores.new_empty(held, parts)
    base = scores.new_empty(steps, held, dtype=torch.int32)
    sums = scores.new_empty(steps, held, parts, slots)
    for step in range(0 if spec.has_top_p else steps + 1, steps + 2):
        kernel(
            (rows * parts,), scores, call.temperature, call.top_p, call.key, out, top, base, sums,
            call.fill, rows, step,
        )  # fmt: skip
    return out


def call_of(
    scores: torch.Tensor,
    temperature: torch.Tensor | None,
    top_p: torch.Tensor | None,
    key: torch.Tensor | None,
    fill: float,
) -> SampleCall:
    """A call of qoqc::sample_scores, checked; ValueError for what the kernel does not take."""
    spec = spec_of(scores, temperature, top_p, key)
    scores = scores.contiguous()
    temperature, top_p, key = (
        scores if column is None else column.contiguous() for column in (temperature, top_p, key)
    )
    return SampleCall(spec, scores, temperature, top_p, key, fill)


@by_facts
def spec_of(
    scores: torch.Tensor,
    temperature: torch.Tensor | None,
    top_p: torch.Tensor | None,
    key: torch.Tensor | None,
) -> SampleSpec:
    """The spec of a call; ValueError for what the kernel does not take."""
    if scores.dtype is not torch.float32 or scores.dim() != 2 or scores.shape[1] == 0:
        raise ValueError(
            f"sample_scores: scores must be float32 [rows, vocabulary], with a vocabulary, got "
            f"{scores.dtype} {tuple(scores.shape)}"
        )
    columns = {"temperature": temperature, "top_p": top_p, "key": key}
    for name, column in columns.items():
        dtype = torch.int32 if name == "key" else torch.float32
        if column is not None and (column.dtype is not dtype or column.shape != scores.shape[:1]):
            raise ValueError(
                f"sample_scores: {name} must be {dtype} [{scores.shape[0]}], a number per row, "
                f"got {column.dtype} {tuple(column.shape)}"
            )
    check_device("sample_scores", scores=scores, **columns)
    given = (column is not None for column in columns.values())
    return SampleSpec(scores.shape[1], *given)


def bind(spec: SampleSpec, tile: Tile) -> dict[str, Any]:
    """The constexprs of `sample_kernel`."""
    parts = ceil_div(spec.vocabulary, tile["PART"])
    return {
        "V": spec.vocabulary,
        "PARTS": parts,
        "HAS_TEMPERATURE": int(spec.has_temperature),
        "HAS_TOP_P": int(spec.has_top_p),
        "HAS_KEY": int(spec.has_key),
        "BLOCK_P": triton.next_power_of_2(parts),
        **dict(tile.constexprs),
    }


def heuristic(spec: SampleSpec, size: int, device: DeviceKey) -> Tile:
    """The same for any number of rows, so that a row is cut the same in every batch."""
    part = min(PART, triton.next_power_of_2(spec.vocabulary))
    constexprs = (("PART", part), ("COLUMNS", min(COLUMNS, part)), depends_on(device))
    return Tile(constexprs, num_warps=4, num_stages=1)


def candidates(spec: SampleSpec, size: int, device: DeviceKey) -> Sequence[Tile]:
    """The heuristic's alone: tiles are chosen by the number of rows, see there."""
    return (heuristic(spec, size, device),)


def trial(spec: SampleSpec, size: int, device: torch.device) -> Trial:
    """Sample from `size` rows of random scores."""
    generator = torch.Generator(device).manual_seed(0)
    scores = torch.randn(size, spec.vocabulary, generator=generator, device=device)
    temperature = torch.full((size,), 0.8, device=device) if spec.has_temperature else None
    top_p = torch.full((size,), 0.9, device=device) if spec.has_top_p else None
    key = torch.arange(1, size + 1, dtype=torch.int32, device=device) if spec.has_key else None
    call = call_of(scores, temperature, top_p, key, -torch.inf)

    def run(kernel: Launch) -> tuple[torch.Tensor, ...]:
        return (launch(kernel, call),)

    return run


TOLERANCE = 4e-6
"""By how much noise may differ, relative to the largest score: the logarithms' last bits."""

SAMPLE = Family(
    "sample_scores",
    sample_kernel,
    bind,
    heuristic,
    candidates,
    SELFCHECK,
    trial,
    tolerance=TOLERANCE,
    pdl=True,
)
