"""A decode step by its kernels against the definition, over ragged caches in pages."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
from typing import Any, Literal

import pytest
import torch
import triton
import triton.language as tl

from qoqc.codegen import dispatch
from qoqc.codegen.build import build
from qoqc.codegen.family import Family, Kernel
from qoqc.codegen.kernels import step_call, step_families
from qoqc.codegen.kernels.step_families import STEP_APPEND, STEP_ATTEND, STEP_COMBINE
from qoqc.codegen.kernels.step_schedule import grid_for, owner_of, run_start
from qoqc.codegen.kernels.step_spec import Step, StepSpec, random_step, spec_of
from qoqc.ir import kv_reference
from qoqc.ir.spec import PAGE, KVSpec
from qoqc.quant.kv import make_words
from qoqc.runtime.device import device_key

Bits = Literal[4, 8]
CHANGED = ("k_pages", "v_pages", "kv_words", "length")

# relative error of the output: its rounding, and fp16 weights of values (fp32: tf32 terms)
LIMIT = {torch.float32: 2e-6, torch.float16: 8e-4, torch.bfloat16: 2e-3}


def tiny(**changes: Any) -> StepSpec:
    """Two KV heads of 16 channels; `bits` and `dims` of the cache, the rest as in StepSpec."""
    bits, dims = changes.pop("bits", 4), changes.pop("dims", (16, 16))
    changes.setdefault("rotated", 0 if changes.get("form") == "none" else dims[0])
    heads = changes.pop("heads", 4)
    return StepSpec(heads, KVSpec(2, *dims, bits), changes.pop("dtype", torch.float32), **changes)


def step_of(spec: StepSpec, lengths: list[int], device: torch.device | str = "cpu") -> Step:
    """A step after `lengths` tokens; stale words of an earlier owner are NaN."""
    step = random_step(spec, len(lengths), max(lengths), torch.device("cpu"))
    generator = torch.Generator().manual_seed(len(lengths))
    scale = torch.rand(step.kv_words.shape, generator=generator) + 0.5
    top = 2**spec.kv.bits - 1
    step.kv_words.copy_(make_words((4 * scale / top).half(), (-2 * scale).half()))
    for b, length in enumerate(lengths):
        for i, page in enumerate(step.block_table[b].tolist()):
            step.kv_words[page, :, :, max(0, min(PAGE, length - i * PAGE)) :] = 0x7E007E00
    if step.mask is not None:
        step.mask.copy_(torch.rand(step.mask.shape, generator=generator) < 0.6)
    step.length.copy_(torch.tensor(lengths))
    return moved(step, torch.device(device))


def moved(step: Step, device: torch.device) -> Step:
    tensors = {n: x for n, x in vars(step).items() if isinstance(x, torch.Tensor)}
    return dataclasses.replace(step, **{n: x.to(device) for n, x in tensors.items()})


def copied(step: Step) -> Step:
    return dataclasses.replace(step, **{name: getattr(step, name).clone() for name in CHANGED})


def run(step: Step) -> tuple[torch.Tensor, Step]:
    after = copied(step)
    return dispatch.kv4_decode(*vars(after).values()), after


def check(step: Step) -> torch.Tensor:
    """Compare with the definition: the append in the same launch and before it, parts added up by
    their last worker and after it."""
    cpu = copied(moved(step, torch.device("cpu")))
    expected = kv_reference.kv_decode(*vars(cpu).values())
    normed = step.q_weight is not None
    for fused, meeting in itertools.product((0, 1), (10**9, 1)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(step_call, "MEETING", meeting)
            patch.setattr(step_families, "FUSED", fused)
            patch.setattr(dispatch, "_KERNELS", {})
            out, after = run(step)
        assert torch.equal(after.length.cpu(), cpu.length)
        if not normed:  # sums of squares in another order may move a code by one
            for name in CHANGED:
                assert torch.equal(getattr(after, name).cpu(), getattr(cpu, name)), name
        assert torch.isfinite(out).all()
        error = (out.cpu().double() - expected.double()).norm() / expected.double().norm()
        assert error < LIMIT[step.q.dtype], float(error)
    return out


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"form": "interleaved", "rotated": 8, "has_mask": True},
        {"form": "none", "has_sinks": True, "has_softcap": True},
        {"rotated": 8, "normed": True, "offset": 1.0, "round_first": False},
    ],
    ids=["half", "interleaved masked", "sinks softcap", "partial normed"],
)
def test_step_equals_its_definition(changes: dict[str, Any], bits: Bits) -> None:
    check(step_of(tiny(bits=bits, **changes), [130, 0, 63, 64]))


WINDOWS = [1, 63, 64, 65, 128, 4096]


@pytest.mark.parametrize("window", WINDOWS)
def test_windows(window: int) -> None:
    """Ragged, around page borders and the window; pages before the window are another's."""
    lengths = [200, 63, 64, max(0, min(window, 192) - 2), min(window, 192)]
    step = windowed(step_of(tiny(has_sinks=window == 65), lengths), window)
    check(step)
    all_seen, near = run(dataclasses.replace(step, window=0))[0], run(step)[0]
    assert torch.equal(all_seen, near) == (window > 200)
    assert torch.equal(run(forgotten(step))[0], near)


def windowed(step: Step, window: int) -> Step:
    return dataclasses.replace(step, window=window)


def forgotten(step: Step) -> Step:
    """The step over pages that another owner has spoilt where no window reaches."""
    words, table = step.kv_words.clone(), step.block_table.clone()
    for b, length in enumerate(step.length.tolist()):
        for i in range(max(0, length + 1 - step.window) // PAGE):
            words[table[b, i]] = 0x7E007E00
            table[b, i] = 0
    return dataclasses.replace(step, kv_words=words, block_table=table)


@pytest.mark.parametrize(("slots", "bits"), [(2, 4), (5, 8)])
def test_windows_with_a_mask_in_runs_of_several(
    slots: int, bits: Bits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_call, "slots_of", lambda device, tile: slots)
    check(windowed(step_of(tiny(has_mask=True, bits=bits), [5, 330, 0, 190]), 70))
    check(windowed(step_of(tiny(bits=bits), [170] * 4), 70))


def test_bf16_step() -> None:
    check(step_of(tiny(dtype=torch.bfloat16, normed=True), [70, 1]))


def test_odd_shapes() -> None:
    check(step_of(tiny(heads=6, dims=(24, 10)), [65, 128]))


def test_heads_with_masks_of_their_own() -> None:
    step = step_of(tiny(has_mask=True), [70, 5])
    assert step.mask is not None
    step = dataclasses.replace(step, mask=step.mask.expand(-1, 4, -1, -1).clone())
    assert step.mask is not None
    step.mask[:, 1::2] ^= True
    check(step)


def test_a_token_that_sees_nothing_gives_zero() -> None:
    step = step_of(tiny(has_mask=True), [70, 3])
    assert step.mask is not None
    step.mask[1] = False
    out, _ = run(step)
    assert (out[1] == 0).all() and (out[0] != 0).any()


def test_a_full_sequence_gives_nan_and_nothing_is_written() -> None:
    step = step_of(tiny(), [128, 5])
    step.length[0] = step.block_table.shape[1] * PAGE
    pages = step.k_pages[step.block_table[0].long()].clone()
    out, after = run(step)
    assert out[0].isnan().all() and torch.isfinite(out[1]).all()
    assert torch.equal(after.k_pages[step.block_table[0].long()], pages)


def test_a_nan_key_stays_in_its_sequence() -> None:
    step = step_of(tiny(), [70, 70])
    step.k[0, 0, 0, 3] = float("nan")
    out, _ = run(step)
    assert out[0, :2].isnan().all()
    assert torch.isfinite(out[0, 2:]).all() and torch.isfinite(out[1]).all()


def test_large_and_constant_values_are_finite() -> None:
    step = step_of(tiny(dtype=torch.float16), [66, 2])
    step.k.fill_(1e4)
    step.v.fill_(-1e4)
    out, _ = run(step)
    assert torch.isfinite(out).all()


def test_nothing_to_do() -> None:
    step = random_step(tiny(), 1, 5, torch.device("cpu"))
    empty = {n: x[:0] for n, x in vars(step).items() if n in ("q", "k", "v", "block_table")}
    step = dataclasses.replace(step, **empty, length=step.length[:0], cos=None, sin=None)
    out = dispatch.kv4_decode(*vars(dataclasses.replace(step, form="none")).values())
    assert out.shape == (0, 4, 1, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"form": "spiral"}, "expected one of none, half, interleaved"),
        ({"cos": None}, "needs cos and sin"),
        ({"mask": torch.ones(1, 4, 1, 64, dtype=torch.bool)}, "mask must be bool"),
        ({"mask": torch.ones(1, 1, 1, 64)}, "mask must be bool"),
        ({"q_weight": torch.ones(16)}, "or neither"),
        ({"sinks": torch.ones(3)}, "sinks is"),
        ({"length": torch.zeros(3, dtype=torch.long)}, "2 sequences, but length is"),
        ({"k": torch.zeros(2, 2, 2, 16)}, "one new token per sequence"),
        ({"bits": 8}, "not a KV cache of 8 bits"),
        ({"window": -3}, "window=-3: expected a number of keys"),
        ({"v": torch.zeros(2, 2, 1, 16).half()}, "must have one 16-bit or fp32"),
        ({"length": torch.zeros(2, dtype=torch.long, device="meta")}, "must be on one device"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    step = random_step(tiny(), 2, 5, torch.device("cpu"))
    with pytest.raises(ValueError, match=message):
        spec_of(dataclasses.replace(step, **change))


@pytest.mark.parametrize("slots", [2, 5])
def test_runs_of_several_sequences(slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # the last of a worker's sequences begins late: lengths must not be counted before
    monkeypatch.setattr(step_call, "slots_of", lambda device, tile: slots)
    check(step_of(tiny(), [5, 130, 0, 63, 190, 64]))
    check(step_of(tiny(), [70] * 5))


@pytest.mark.parametrize("fused", [0, 1])
def test_one_step_after_another(fused: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_families, "FUSED", fused)
    monkeypatch.setattr(dispatch, "_KERNELS", {})
    step = step_of(tiny(), [62, 0, 124])
    one, other = copied(step), copied(step)
    for _ in range(3):
        out = dispatch.kv4_decode(*vars(one).values())
        expected = kv_reference.kv_decode(*vars(other).values())
    for name in CHANGED:
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert (out - expected).norm() < LIMIT[torch.float32] * expected.norm()


@pytest.mark.parametrize("family", [STEP_APPEND, STEP_ATTEND, STEP_COMBINE], ids=lambda f: f.name)
def test_generated_files_check_themselves(family: Family, device: torch.device) -> None:
    spec = tiny(form="interleaved", rotated=8, normed=True, has_mask=True)
    for each in (spec, dataclasses.replace(spec, has_window=True)):
        checked(build(family, each, family.heuristic(each, 3, device_key(device))))


def test_the_second_of_two_launches_checks_itself(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_families, "FUSED", 0)
    tile = STEP_ATTEND.heuristic(tiny(), 3, device_key(device))
    assert tile["FUSED"] == 0
    checked(build(STEP_ATTEND, tiny(), tile))


def checked(kernel: Kernel) -> None:
    run = subprocess.run([sys.executable, str(kernel.path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "batch=" in run.stdout


def whose(
    place_ptr: int, start_ptr: int, owner_ptr: int, total: int, workers: int, count: int
) -> None:
    """For places of a row: the worker that has each, and where that worker's run begins."""
    for i in range(count):
        owner = owner_of(tl.load(place_ptr + i), total, workers)
        tl.store(owner_ptr + i, owner)
        tl.store(start_ptr + i, run_start(owner, total, workers))


@pytest.mark.parametrize(
    ("total", "workers"), [(1, 1), (160, 80), (20_001, 1584), (1_000_003, 2112), (2**24 + 5, 1056)]
)
def test_owners_of_pages_in_32_bits(total: int, workers: int, device: torch.device) -> None:
    bounds = [-(-w * total // workers) for w in (0, 1, workers // 2, workers - 1, workers)]
    places = sorted({place for b in bounds for place in (b - 1, b, b + 1) if 0 <= place < total})
    taken = torch.tensor(places, dtype=torch.int32, device=device)
    starts, owners = torch.empty_like(taken), torch.empty_like(taken)
    kernel: Any = triton.jit(do_not_specialize=["total", "workers", "count"])(whose)
    kernel[(1,)](taken, starts, owners, total, workers, len(places))
    expected = [place * workers // total for place in places]
    assert owners.tolist() == expected
    assert starts.tolist() == [-(-owner * total // workers) for owner in expected]


def test_grid_follows_capacity_and_the_device() -> None:
    assert grid_for(64, 8, 16, 1584) == 1584
    assert grid_for(1, 8, 4, 1584) == 16
    assert grid_for(1, 1, 1, 1584) == 1
    # a window of 65 tokens may touch three pages, of 64 or 2 two, and there may be fewer
    assert [grid_for(2, 8, 9, 1584, window) for window in (1, 2, 65, 66)] == [8, 16, 16, 24]
    assert grid_for(2, 8, 2, 1584, 4096) == 16


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (32, 8), (16, 1), (12, 4)])
def test_shapes_on_a_gpu(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    spec = StepSpec(heads, KVSpec(kv_heads, dim, dim), dtype, rotated=dim, has_mask=True)
    check(step_of(spec, [0, 1, 63, 64, 65, 700, 127, 2000], "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3, 130, 1024])
def test_batches_on_a_gpu(batch: int) -> None:
    lengths = [(37 * b * b) % 300 for b in range(batch)]
    check(step_of(StepSpec(8, KVSpec(2, 64, 64), torch.bfloat16, rotated=64), lengths, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", [(), ("has_sinks", "has_mask"), ("has_softcap",)])
@pytest.mark.parametrize("window", [*WINDOWS, 1000])
def test_windows_on_a_gpu(window: int, kind: tuple[str, ...], bits: Bits) -> None:
    lengths = [0, 1, 63, 64, 65, 5000, window - 1, window, window + 1, 127, 2000]
    flags: dict[str, Any] = dict.fromkeys(kind, True)
    spec = StepSpec(32, KVSpec(8, 128, 128, bits), torch.bfloat16, rotated=128, **flags)
    step = windowed(step_of(spec, lengths, "cuda"), window)
    check(step)
    assert torch.equal(run(forgotten(step))[0], run(step)[0])


@pytest.mark.gpu
def test_same_bits_every_time_under_load() -> None:
    spec = StepSpec(32, KVSpec(8, 128, 128), torch.bfloat16, rotated=128)
    step = step_of(spec, [5000, 17, 900, 64], "cuda")
    first, _ = run(step)
    other = torch.cuda.Stream()
    noise = torch.randn(2048, 2048, device="cuda")
    for _ in range(200):
        with torch.cuda.stream(other):
            noise = noise @ noise * 1e-2
        assert torch.equal(run(step)[0], first)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[60, 5000, 17], [900] * 70], ids=["apart", "together"])
def test_steps_at_once_after_one_another(lengths: list[int]) -> None:
    # the blocks of each may start while those of the one before, which counts, still run
    spec = StepSpec(32, KVSpec(8, 128, 128), torch.bfloat16, rotated=128)
    step = step_of(spec, lengths, "cuda")
    one, other = copied(step), copied(step)
    outs = [dispatch.kv4_decode(*vars(one).values()) for _ in range(5)]
    expected = [kv_reference.kv_decode(*vars(other).values()) for _ in range(5)]
    for name in CHANGED:
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    for out, want in zip(outs, expected, strict=True):
        assert (out - want).float().norm() < LIMIT[spec.dtype] * want.float().norm()


@pytest.mark.gpu
def test_shared_prefix_pages_are_only_read() -> None:
    spec = StepSpec(8, KVSpec(2, 64, 64), torch.bfloat16, rotated=64)
    step = step_of(spec, [130, 140], "cuda")
    step.block_table[1, :2] = step.block_table[0, :2]
    before = step.k_pages[step.block_table[0, :2].long()].clone()
    check(step)
    _, after = run(step)
    assert torch.equal(after.k_pages[step.block_table[0, :2].long()], before)
