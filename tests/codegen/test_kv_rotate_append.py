"""Rotation and append in one kernel against the definition: every bit, but for a head norm's sums.

A norm adds its squares in another order than torch, so what it gives may differ by one step of the
dtype (2**-7 of a bfloat16) before the product with the weight and after it; the codes of a key are
then those of the key that the kernel returns.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch

from qoqc.codegen import dispatch
from qoqc.codegen.build import build
from qoqc.codegen.kernels.rotate_append_call import (
    KV_ROTATE_APPEND,
    Append,
    RotateSpec,
    candidates,
    launch,
    random_call,
    share_of,
)
from qoqc.ir import kv_reference
from qoqc.ir.spec import PAGE, KVSpec
from qoqc.quant.kv import split_words
from qoqc.runtime.device import device_key

BF16 = torch.bfloat16
CPU = torch.device("cpu")
SPEC = RotateSpec(2, KVSpec(1, 16, 16), BF16, "half", 16)


def case(
    spec: RotateSpec,
    start: list[int],
    seq: int,
    *,
    per_sequence: int = 3,
    layout: str = "tokens",
    one_angle: bool = False,
) -> Append:
    """A call on the CPU: pages full of what an earlier owner left, in any order.

    layout     "tokens" [B, S, H, D], "merged" (q, k, v in one tensor), "heads" [B, H, S, D]
    one_angle  one set of angles for all sequences
    """
    batch = len(start)
    call = random_call(spec, batch, seq, CPU)
    generator = torch.Generator().manual_seed(seq)
    pages = torch.randperm(batch * per_sequence + 2, generator=generator)
    tensors: dict[str, Any] = {
        "block_table": pages[: batch * per_sequence].view(batch, -1).int(),
        "start": torch.tensor(start),
    }
    for name in ("k_pages", "v_pages", "kv_words"):
        shape = (len(pages), *getattr(call, name).shape[1:])
        old = torch.randint(0, 256, shape, generator=generator)
        tensors[name] = old.to(getattr(call, name).dtype)
    if layout == "heads":
        tensors |= {name: getattr(call, name).contiguous() for name in "qkv"}
    if layout == "merged":
        rows = torch.cat([getattr(call, name).transpose(1, 2).flatten(2) for name in "qkv"], -1)
        sizes = [getattr(call, n).shape[1] * getattr(call, n).shape[3] for n in "qkv"]
        parts = rows.split(sizes, -1)
        for name, part in zip("qkv", parts, strict=True):
            heads = getattr(call, name).shape[1]
            tensors[name] = part.unflatten(-1, (heads, -1)).transpose(1, 2)
    if one_angle and call.cos is not None and call.sin is not None:
        tensors |= {"cos": call.cos[:1], "sin": call.sin[:1]}
    return dataclasses.replace(call, **tensors)


def on(call: Append, device: torch.device) -> Append:
    """A copy of the call that shares no storage with it; strides of q, k and v stay."""
    fields = {field.name: getattr(call, field.name) for field in dataclasses.fields(call)}
    copies = {}
    for name, x in fields.items():
        if isinstance(x, torch.Tensor):
            copies[name] = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
            copies[name].copy_(x)
    return dataclasses.replace(call, **copies)


def arguments(call: Append) -> tuple[Any, ...]:
    return tuple(getattr(call, field.name) for field in dataclasses.fields(call))


def check(call: Append, spec: RotateSpec, device: torch.device) -> None:
    """The kernel gives what the definition gives, and leaves the pages as the definition does."""
    given, wanted = on(call, device), on(call, CPU)
    q, k = (x.cpu() for x in dispatch.kv4_rotate_append(*arguments(given)))
    q_want, k_want = kv_reference.kv_rotate_append(*arguments(wanted))
    assert q.stride() == q_want.stride() and k.stride() == k_want.stride()
    pages = (wanted.k_pages, wanted.v_pages, wanted.kv_words)
    if spec.normed:
        step = 2 * torch.finfo(spec.dtype).eps
        for x, y in ((q, q_want), (k, k_want)):
            torch.testing.assert_close(x, y, rtol=2 * step, atol=step * float(y.abs().max()) / 8)
        clean = on(call, CPU)
        pages = (clean.k_pages, clean.v_pages, clean.kv_words)
        kv_reference.kv_append(
            *pages, call.block_table, call.start, k, call.v, spec.kv.bits
        )  # fmt: skip
    else:
        assert torch.equal(q, q_want), "q"
        assert torch.equal(k, k_want), "k"
    for name, x, y in zip("kv", (given.k_pages, given.v_pages), pages, strict=False):
        assert torch.equal(x.cpu(), y), f"{name}_pages"
    for x, y in zip(split_words(given.kv_words.cpu()), split_words(pages[2]), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


FORMS = {
    "half": SPEC,
    "half of half": dataclasses.replace(SPEC, rotated=8),
    "interleaved": dataclasses.replace(SPEC, form="interleaved"),
    "some pairs": dataclasses.replace(SPEC, form="interleaved", rotated=6),
    "none": dataclasses.replace(SPEC, form="none", rotated=0),
    "uneven halves": dataclasses.replace(SPEC, kv=KVSpec(1, 20, 24), rotated=20),
}
NORMS = {
    "plain": {},
    "round, then weight": {"normed": True},
    "one plus weight": {"normed": True, "offset": 1.0, "round_first": False},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("norm", NORMS)
def test_equal_to_the_definition(form: str, norm: str, device: torch.device) -> None:
    spec = dataclasses.replace(FORMS[form], **NORMS[norm])
    check(case(spec, [61], 5), spec, device)


@pytest.mark.parametrize("start", [[0, 63], [31, 128], [32, 95]])
@pytest.mark.parametrize("bits", [4, 8])
def test_one_token(start: list[int], bits: Any, device: torch.device) -> None:
    spec = dataclasses.replace(SPEC, heads=4, kv=KVSpec(2, 16, 24, bits))
    check(case(spec, start, 1), spec, device)


@pytest.mark.parametrize("start", [0, 1, 63, 64])
def test_page_borders(start: int, device: torch.device) -> None:
    spec = dataclasses.replace(SPEC, heads=1, kv=KVSpec(1, 16, 16))
    check(case(spec, [start], 67), spec, device)


@pytest.mark.parametrize("layout", ["tokens", "merged", "heads"])
@pytest.mark.parametrize("one_angle", [False, True])
def test_layouts(layout: str, one_angle: bool, device: torch.device) -> None:
    spec = dataclasses.replace(SPEC, heads=4, kv=KVSpec(2, 16, 16))
    check(case(spec, [3, 60], 6, layout=layout, one_angle=one_angle), spec, device)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (5, 1)])
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
def test_groups_and_dtypes(
    heads: int, kv_heads: int, dtype: torch.dtype, device: torch.device
) -> None:
    spec = dataclasses.replace(SPEC, heads=heads, kv=KVSpec(kv_heads, 16, 16), dtype=dtype)
    check(case(spec, [61], 5), spec, device)


@pytest.mark.parametrize(("heads", "kv_heads"), [(7, 1), (12, 2), (16, 2), (20, 4), (40, 1)])
@pytest.mark.parametrize("form", ["half", "interleaved"])
def test_heads_of_one_token_and_of_a_few(
    heads: int, kv_heads: int, form: str, device: torch.device
) -> None:
    spec = dataclasses.replace(SPEC, heads=heads, kv=KVSpec(kv_heads, 16, 16), form=form)
    check(case(spec, [61, 3], 5, layout="merged"), spec, device)


@pytest.mark.parametrize(("appends", "turns"), [(1, 1), (8, 3), (544, 1024), (3, 70001), (4096, 7)])
def test_programs_that_append_are_evenly_mixed_with_the_others(appends: int, turns: int) -> None:
    share, total = share_of(appends, turns), appends + turns
    before = [2 * pid * share >> 32 for pid in range(total + 1)]
    assert before[0] == 0 and before[total] == appends
    assert all(later - earlier in (0, 1) for earlier, later in itertools.pairwise(before))
    assert all(abs(n - pid * appends / total) <= 1 for pid, n in enumerate(before))
    # of the largest grid, too, not one is left out or taken twice
    assert (2**31 - 1) * share_of(appends, 2**31 - 1 - appends) >> 31 == appends


def test_angles_of_another_dtype(device: torch.device) -> None:
    """OLMo 2 keeps its cosines in fp32."""
    call = case(SPEC, [61], 5)
    assert call.cos is not None and call.sin is not None
    turns = torch.rand(1, 5, 16, generator=torch.Generator().manual_seed(0)) * 6
    check(dataclasses.replace(call, cos=turns.cos(), sin=turns.sin()), SPEC, device)


def test_special_vectors(device: torch.device) -> None:
    spec = dataclasses.replace(SPEC, dtype=torch.float32)
    call = case(spec, [58], 6, layout="heads")
    for x in (call.k, call.v):
        x[:, :, 0] = 0
        x[:, :, 1] = 3.1
        x[:, :, 2] = 1e6
        x[:, :, 3] *= 1e-30
        x[:, :, 4] = torch.arange(16.0)
    call.v[:, :, 5, 3] = torch.inf
    check(call, spec, device)


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_a_nan_stays_in_its_vector(dtype: torch.dtype, device: torch.device) -> None:
    spec = dataclasses.replace(SPEC, heads=4, kv=KVSpec(2, 16, 16), dtype=dtype)
    call = case(spec, [30], 40)
    for x in (call.k, call.v):
        x[0, 1, 3, 15] = torch.nan
        x[0, 0, 34, 0] = -torch.nan
    given, wanted = on(call, device), on(call, CPU)
    dispatch.kv4_rotate_append(*arguments(given))
    kv_reference.kv_rotate_append(*arguments(wanted))
    for name in ("k_pages", "v_pages"):
        assert torch.equal(getattr(given, name).cpu(), getattr(wanted, name)), name
    for x, y in zip(split_words(given.kv_words.cpu()), split_words(wanted.kv_words), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
        assert int(torch.isnan(x).sum()) >= 4


def test_tokens_past_the_table_are_prepared_and_not_written(device: torch.device) -> None:
    spec, seq = SPEC, 6
    call = case(spec, [3 * PAGE - 2], seq)
    given, wanted = on(call, device), on(call, CPU)
    q, k = dispatch.kv4_rotate_append(*arguments(given))
    cut = {name: getattr(wanted, name)[:, :, :2] for name in "qkv"}
    angles = {name: getattr(wanted, name)[:, :2] for name in ("cos", "sin")}
    kv_reference.kv_rotate_append(*arguments(dataclasses.replace(wanted, **cut, **angles)))
    assert torch.equal(given.k_pages.cpu(), wanted.k_pages)
    assert torch.equal(given.v_pages.cpu(), wanted.v_pages)
    at_start = case(spec, [0], seq)
    elsewhere = dataclasses.replace(call, start=at_start.start)
    q_want, k_want = kv_reference.kv_rotate_append(*arguments(on(elsewhere, CPU)))
    assert torch.equal(q.cpu(), q_want) and torch.equal(k.cpu(), k_want)


@pytest.mark.parametrize("seq", [1, 5])
def test_every_candidate_gives_the_same_bits(seq: int, device: torch.device) -> None:
    call = case(SPEC, [60], seq)
    results = []
    for tile in candidates(SPEC, seq, device_key(device)):
        given = on(call, device)
        q, k = launch(build(KV_ROTATE_APPEND, SPEC, tile), given)
        results.append((q, k, given.k_pages, given.v_pages, given.kv_words))
    assert len(results) > 2
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_nothing_to_append(device: torch.device) -> None:
    whole = case(SPEC, [5], 3)
    none = {name: getattr(whole, name)[:0] for name in (*"qkv", "block_table", "start")}
    for changes in (none, {"q": whole.q[:, :, :0], "k": whole.k[:, :, :0], "v": whole.v[:, :, :0]}):
        angles = {"cos": None, "sin": None, "form": "none"}
        call = on(dataclasses.replace(whole, **changes, **angles), device)
        q, _ = dispatch.kv4_rotate_append(*arguments(call))
        assert q.shape == call.q.shape
        assert torch.equal(call.k_pages.cpu(), whole.k_pages)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "twisted"}, "form 'twisted', expected one of none, half, interleaved"),
        ({"cos": None}, "cos None for q"),
        ({"cos": torch.zeros(1, 4, 16)}, r"cos \(1, 4, 16\) for q"),
        ({"sin": torch.zeros(1, 3, 8)}, "16 cosines and 8 sines for 16 channels"),
        ({"k": torch.zeros(1, 2, 3, 16).bfloat16()}, "do not fit a cache of 1 heads x 16 and 16"),
        ({"v": torch.zeros(1, 1, 3, 16)}, "must have one 16-bit or fp32 floating-point dtype"),
        ({"q_weight": torch.zeros(16)}, "pass q_weight and k_weight, or neither"),
        ({"start": torch.zeros(2).long()}, "1 sequences, but start is"),
        (
            {"q_weight": torch.zeros(8), "k_weight": torch.zeros(8)},
            r"q_weight is \(8,\) with strides \(1,\), expected \(16,\)",
        ),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    call = dataclasses.replace(case(SPEC, [0], 3), **changes)
    with pytest.raises(ValueError, match=message):
        dispatch.kv4_rotate_append(*arguments(call))


def test_a_kernel_of_single_tokens_takes_no_more() -> None:
    tile = KV_ROTATE_APPEND.heuristic(SPEC, 1, device_key(CPU))
    with pytest.raises(ValueError, match="appends 1 token, got 3"):
        launch(build(KV_ROTATE_APPEND, SPEC, tile), case(SPEC, [0], 3))


DIMS = [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)]


@pytest.mark.gpu
@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (32, 8), (16, 1)])
@pytest.mark.parametrize("form", ["half", "interleaved", "quarter"])
@pytest.mark.parametrize("norm", NORMS)
def test_large(
    dims: tuple[int, int], heads: int, kv_heads: int, form: str, norm: str, device: torch.device
) -> None:
    rotated = dims[0] // 4 if form == "quarter" else dims[0]
    name = "half" if form == "quarter" else form
    spec = RotateSpec(heads, KVSpec(kv_heads, *dims), BF16, name, rotated, **NORMS[norm])
    for start, seq in (([0, 63, 64, 65, 200], 1), ([1, 127], 130)):
        check(case(spec, start, seq, per_sequence=5, layout="merged"), spec, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("bits", [4, 8])
def test_large_dtypes(dtype: torch.dtype, bits: Any, device: torch.device) -> None:
    spec = RotateSpec(32, KVSpec(8, 128, 128, bits), dtype, "half", 128)
    check(case(spec, [5, 700], 1025, per_sequence=30), spec, device)


@pytest.mark.gpu
def test_addresses_beyond_two_to_the_31(device: torch.device) -> None:
    """Queries of more than 2**31 elements: the last tokens are right."""
    spec, seq = RotateSpec(32, KVSpec(8, 128, 128), BF16, "half", 128), 2**19 + 3
    call = random_call(spec, 1, seq, device)
    q, _ = dispatch.kv4_rotate_append(*arguments(call))
    assert call.cos is not None and call.sin is not None
    last = {name: getattr(call, name)[:, :, -3:].cpu() for name in "qkv"}
    angles = {name: getattr(call, name)[:, -3:].cpu() for name in ("cos", "sin")}
    small = dataclasses.replace(case(spec, [0], 3), **last, **angles)
    want, _ = kv_reference.kv_rotate_append(*arguments(small))
    assert torch.equal(q[:, :, -3:].cpu(), want)
