from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch

from qoqc.codegen import dispatch
from qoqc.codegen.build import build
from qoqc.codegen.family import Family
from qoqc.codegen.kernels import attention_decode
from qoqc.codegen.kernels.attention import Call
from qoqc.codegen.kernels.attention_combine import ATTENTION_COMBINE
from qoqc.codegen.kernels.attention_decode import ATTENTION_DECODE, MAX_ROWS, choose_splits
from qoqc.codegen.kernels.attention_prefill import ATTENTION_PREFILL
from qoqc.ir import kv_reference
from qoqc.ir.spec import PAGE, AttentionSpec, KVSpec
from qoqc.quant.kv import empty_pages
from qoqc.runtime.device import device_key

Bits = Literal[4, 8]

attention: Callable[..., torch.Tensor] = dispatch.kv4_attention
append: Callable[..., None] = kv_reference.kv_append
twin: Callable[..., torch.Tensor] = kv_reference.kv_attention
read: Callable[..., tuple[torch.Tensor, torch.Tensor]] = kv_reference.kv_read

# relative error of the whole output against fp64: the rounding of the output dtype, and what the
# operands lose: fp16 weights and codes for 16-bit models, three tf32 terms for fp32
LIMIT = {torch.float32: 2e-6, torch.float16: 8e-4, torch.bfloat16: 2e-3}


def make_call(
    lengths: tuple[int, ...] = (65, 128),
    *,
    bits: Bits = 4,
    dims: tuple[int, int] = (16, 16),
    kv_heads: int = 2,
    group: int = 2,
    seq: int = 1,
    mask: tuple[int, int] | None = None,
    chunk: bool = False,
    dtype: torch.dtype = torch.float32,
    size: tuple[float, float] = (1.0, 1.0),
    pages: int = 3,
) -> Call:
    """A call on the CPU over a cache filled by the definition; `size` of keys and values."""
    generator = torch.Generator().manual_seed(sum(lengths) + 7 * seq)
    batch, heads = len(lengths), kv_heads * group

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    stored = empty_pages(batch * pages + 1, kv_heads, *dims, bits, "cpu")
    for x in stored:  # what an earlier owner left: words with NaN among them
        x.copy_(torch.randint(0, 256, x.shape, generator=generator))
    stored[2].fill_(0x7E007E00)
    table = torch.randperm(batch * pages + 1, generator=generator)[: batch * pages]
    table = table.view(batch, pages).int()
    for b, length in enumerate(lengths):
        shape = (1, kv_heads, min(length, pages * PAGE))
        k, v = randn(*shape, dims[0]) * size[0], randn(*shape, dims[1]) * size[1]
        start = torch.zeros(1, dtype=torch.long)
        append(*stored, table[b : b + 1], start, k, v, bits)
    bools = None
    if mask is not None:
        bools = torch.rand(*mask, seq, pages * PAGE, generator=generator) < 0.6
        bools = bools[..., : max(lengths)]  # rows keep a longer stride

    def tokens(count: int, dim: int, scale: float) -> torch.Tensor:
        return (randn(batch, seq, count, dim) * scale).to(dtype).transpose(1, 2)

    return Call(
        tokens(heads, dims[0], 1.0),
        *stored,
        table,
        torch.tensor(lengths),
        bools,
        tokens(kv_heads, dims[0], size[0]) if chunk else None,
        tokens(kv_heads, dims[1], size[1]) if chunk else None,
        dims[0] ** -0.5,
    )


def fields(call: Call) -> tuple[Any, ...]:
    """The arguments of the op before bits and causal; softcap and the rest stand behind them."""
    return tuple(vars(call).values())[:-3]


def moved_to(device: torch.device, call: Call) -> list[Any]:
    return [x.to(device) if isinstance(x, torch.Tensor) else x for x in fields(call)]


def attend(call: Call, device: torch.device, bits: Bits = 4, causal: bool = False) -> torch.Tensor:
    sinks = None if call.sinks is None else call.sinks.to(device)
    out = attention(*moved_to(device, call), bits, causal, call.softcap, sinks, call.window)
    assert out.is_contiguous()
    assert out.dtype == call.q.dtype
    return out.cpu()


def exact(call: Call, bits: Bits, causal: bool) -> torch.Tensor:
    """The attention in fp64 over the dequantized cache."""
    seq = call.q.shape[2]
    cache = read(*fields(call)[1:5], bits)
    out = torch.zeros(*call.q.shape[:3], call.v_pages.shape[2], dtype=torch.float64)
    for b, length in enumerate(call.length.tolist()):
        kv = [x[b, :, :length].double() for x in cache]
        for x, chunk in zip(kv, (call.k_chunk, call.v_chunk), strict=True):
            if chunk is not None:
                x[:, length - seq :] = chunk[b].double()
        k, v = (x.repeat_interleave(call.group, 0) for x in kv)
        seen = torch.ones(seq, length, dtype=torch.bool)
        if causal:
            seen &= torch.arange(length) <= (length - seq + torch.arange(seq))[:, None]
        if call.window:
            seen &= torch.arange(length) > (length - seq + torch.arange(seq))[:, None] - call.window
        if call.mask is not None:
            seen = seen & call.mask.expand(len(out), -1, -1, -1)[b, ..., :length]
        scores = (call.q[b].double() @ k.transpose(-1, -2)) * call.scale
        if call.softcap:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        scores = scores.masked_fill(~seen, -torch.inf)
        if call.sinks is not None:
            column = call.sinks.double().view(-1, 1, 1).expand(-1, seq, 1)
            scores = torch.cat((scores, column), -1)
        out[b] = scores.softmax(-1).nan_to_num(0)[..., :length] @ v
    return out


def check(
    call: Call, device: torch.device, bits: Bits = 4, causal: bool = False, name: str = ""
) -> None:
    """Against fp64 in the norm, and close to the definition everywhere."""
    got, want = attend(call, device, bits, causal), exact(call, bits, causal)
    assert not got.isnan().any()
    error = ((got.double() - want).norm() / want.norm().clamp(min=1e-30)).item()
    assert error <= LIMIT[call.q.dtype], f"relative error {error:.2e}"
    defined = twin(*fields(call), bits, causal, call.softcap, call.sinks, call.window)
    bound = 8 * LIMIT[call.q.dtype] * want.abs().max().item()
    torch.testing.assert_close(got.float(), defined.float(), rtol=0, atol=bound)


# rows (queries times group) up to MAX_ROWS go to the decode kernel, more to the prefill kernel
KERNELS = pytest.mark.parametrize("seq", [1, 33], ids=["decode", "prefill"])


@pytest.mark.parametrize("lengths", [(63, 64), (65, 127), (128, 129), (192, 40)])
@KERNELS
def test_page_borders(lengths: tuple[int, ...], seq: int, device: torch.device) -> None:
    check(make_call(lengths, seq=seq), device)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dims", [(2, 4), (64, 32), (80, 96), (48, 32)])
@KERNELS
def test_head_dims(dims: tuple[int, int], bits: Bits, seq: int, device: torch.device) -> None:
    check(make_call((70,), dims=dims, bits=bits, seq=seq), device, bits)


@pytest.mark.parametrize(("kv_heads", "group"), [(3, 1), (1, 3), (1, 7), (1, 16)])
@KERNELS
def test_groups(kv_heads: int, group: int, seq: int, device: torch.device) -> None:
    seq = seq if seq == 1 else MAX_ROWS // group + 1
    check(make_call((90,), kv_heads=kv_heads, group=group, seq=seq), device)


@pytest.mark.parametrize("seq", [1, 2, 17, 33, 70])
@pytest.mark.parametrize("chunk", [False, True])
def test_causal_chunks(seq: int, chunk: bool, device: torch.device) -> None:
    """From single tokens to chunks longer than a page, at offsets of every kind."""
    check(make_call((70, 130), seq=seq, chunk=chunk), device, causal=True)


@pytest.mark.parametrize("mask", [(1, 1), (2, 1), (1, 4), (2, 4)])
@pytest.mark.parametrize("chunk", [False, True])
@KERNELS
def test_masks(mask: tuple[int, int], chunk: bool, seq: int, device: torch.device) -> None:
    call = make_call((100, 65), seq=seq, mask=mask, chunk=chunk)
    check(call, device, causal=chunk)


@KERNELS
def test_expanded_and_strided_masks(seq: int, device: torch.device) -> None:
    call = make_call((70, 130), seq=seq, mask=(2, 1))
    assert call.mask is not None
    narrow = Call(**{**vars(call), "mask": call.mask[:, :, :1].expand(2, 4, seq, -1)})
    check(narrow, device)
    column = call.mask.transpose(2, 3).contiguous().transpose(2, 3)
    check(Call(**{**vars(call), "mask": column}), device)


@KERNELS
def test_sliding_window(seq: int, device: torch.device) -> None:
    """Whole pages are masked, at both ends."""
    call = make_call((190, 150), seq=seq, mask=(1, 1))
    token, query = torch.arange(190), torch.arange(seq)[:, None]
    window = ((token > 70 + query) & (token <= 80 + query))[None, None]
    check(Call(**{**vars(call), "mask": window}), device)


def forget(call: Call, seq: int) -> None:
    """Spoil the pages before all windows, as another owner would: nothing may read them."""
    for b, length in enumerate(call.length.tolist()):
        for i in range(max(0, length - seq + 1 - call.window) // PAGE):
            call.kv_words[call.block_table[b, i]] = 0x7E007E00
            call.block_table[b, i] = 0


@pytest.mark.parametrize("window", [1, 63, 64, 65, 128, 4096])
@pytest.mark.parametrize("chunk", [False, True])
@pytest.mark.parametrize("seq", [1, 3, 33])
def test_windows(window: int, chunk: bool, seq: int, device: torch.device) -> None:
    """Around page borders and the window's size, without the pages that no query sees."""
    lengths = (191, max(1, min(window, 190)), 129, 64)
    plain = make_call(tuple(max(n, seq) for n in lengths), seq=seq, chunk=chunk)
    call = Call(**{**vars(plain), "window": window})
    want = exact(call, 4, causal=True)
    assert window > 190 or (want - exact(plain, 4, causal=True)).norm() > 0.1 * want.norm()
    check(call, device, causal=True)
    got = attend(call, device, causal=True)
    forget(call, seq)
    assert torch.equal(attend(call, device, causal=True), got)


@pytest.mark.parametrize("bits", [4, 8])
@KERNELS
def test_windows_and_all_else(bits: Bits, seq: int, device: torch.device) -> None:
    """With a mask that hides what the window ends with, sinks and a soft cap; not causal."""
    plain = make_call((150, 70), seq=seq, bits=bits, mask=(2, 1))
    sinks = torch.tensor([-3.0, 0.0, 1.0, 20.0])
    check(Call(**{**vars(plain), "window": 66}), device, bits)
    check(Call(**{**vars(plain), "window": 66, "sinks": sinks, "softcap": 0.7}), device, bits)


def test_a_window_equals_its_mask() -> None:
    """The definition with a window is the definition with a mask, bit for bit."""
    call = make_call((190, 70), seq=5, chunk=True)
    place = call.length[:, None] - 5 + torch.arange(5)
    near = (torch.arange(190) > place[..., None] - 40)[:, None]
    masked = Call(**{**vars(call), "mask": near})
    got = twin(*fields(call), 4, True, 0.0, None, 40)
    assert torch.equal(got, twin(*fields(masked), 4, True))


@KERNELS
def test_rows_that_see_nothing_are_zero(seq: int, device: torch.device) -> None:
    call = make_call((70, 0), seq=seq, mask=(1, 1))
    assert call.mask is not None
    call.mask[:, :, 0] = False
    out = attend(call, device)
    assert torch.equal(out[:, :, 0], torch.zeros_like(out[:, :, 0]))
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert seq == 1 or out[0, :, 1:].abs().min() > 0


@KERNELS
def test_masked_nan_stays_hidden(seq: int, device: torch.device) -> None:
    call = make_call((70,), seq=seq, mask=(1, 1))
    assert call.mask is not None
    page, slot = call.block_table[0, 0], 5
    call.mask[..., slot] = False
    want = attend(call, device)
    call.kv_words[page, :, :, slot] = 0x7E007E00
    assert torch.equal(attend(call, device), want)
    call.mask[..., slot] = True
    assert attend(call, device).isnan().all()


@KERNELS
def test_a_sequence_longer_than_its_table_is_nan(seq: int, device: torch.device) -> None:
    call = make_call((60, 100, 192), seq=seq, pages=3)
    call.length[1] = 3 * PAGE + 1
    out = attend(call, device)
    assert out[1].isnan().all()
    assert not out[0].isnan().any()
    assert not out[2].isnan().any()


@pytest.mark.parametrize("size", [(1e4, 1e4), (1.0, 1e4), (1.0, 1e-4), (1e-4, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@KERNELS
def test_magnitudes(
    size: tuple[float, float], dtype: torch.dtype, seq: int, device: torch.device
) -> None:
    if dtype is torch.float16 and size[1] == 1e-4:
        pytest.skip("fp16 has no digits left for such an output")
    check(make_call((100,), seq=seq, size=size, dtype=dtype), device)


@pytest.mark.parametrize("bits", [4, 8])
@KERNELS
def test_values_of_very_different_sizes(bits: Bits, seq: int, device: torch.device) -> None:
    """A huge value that is masked, or barely weighed, takes no digits from the small ones."""
    call = make_call((100,), seq=seq, bits=bits, mask=(1, 1), dtype=torch.float16)
    assert call.mask is not None
    call.mask[..., 7] = False
    huge = torch.full((1, 2, 1, 16), 6e4) * torch.linspace(-1, 1, 16)
    start = torch.tensor([7])
    append(*fields(call)[1:5], start, huge, huge, bits)
    check(call, device, bits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [False, True])
@KERNELS
def test_dtypes(dtype: torch.dtype, chunk: bool, seq: int, device: torch.device) -> None:
    check(make_call((70,), seq=seq, dtype=dtype, chunk=chunk), device, causal=chunk)


@pytest.mark.parametrize("softcap", [0.0, 0.7])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize(("seq", "chunk"), [(1, False), (33, True)])
def test_softcap_and_sinks(
    softcap: float, with_sinks: bool, seq: int, chunk: bool, device: torch.device
) -> None:
    """Also of few queries, which go to the kernel for many then; and of rows that see nothing."""
    plain = make_call((65, 128), seq=seq, chunk=chunk, mask=(2, 1))
    assert plain.mask is not None
    plain.mask[0, :, -1] = False
    sinks = torch.tensor([-3.0, 0.0, 1.0, 20.0]) if with_sinks else None
    call = Call(**{**vars(plain), "softcap": softcap, "sinks": sinks})
    check(call, device, causal=seq > 1)
    if softcap or with_sinks:
        apart = (exact(call, 4, seq > 1) - exact(plain, 4, seq > 1)).norm()
        assert apart > 0.05 * exact(plain, 4, seq > 1).norm()


@pytest.mark.parametrize("shape", ["batch", "queries"])
def test_nothing_to_attend(shape: str, device: torch.device) -> None:
    call = make_call((20,), seq=2)
    none = slice(0, 0)
    if shape == "batch":
        smaller = {n: getattr(call, n)[none] for n in ("q", "block_table", "length")}
    else:
        smaller = {"q": call.q[:, :, none]}
    out = attend(Call(**{**vars(call), **smaller}), device)
    assert out.numel() == 0
    assert out.shape[1] == 4


def test_splits() -> None:
    """At least two pages each where the table is full, never none, at most MAX_SPLITS."""
    assert choose_splits(1, 1, 132) == 1
    assert choose_splits(1, 8, 132) == 4
    assert choose_splits(1, 10**6, 132) == attention_decode.MAX_SPLITS
    assert choose_splits(10**6, 64, 132) == 1


@pytest.mark.parametrize("splits", [1, 2, 3, 7])
def test_any_number_of_splits(
    splits: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_decode, "choose_splits", lambda *_: splits)
    check(make_call((190, 3), chunk=True), device)


@pytest.mark.parametrize(
    "family", [ATTENTION_DECODE, ATTENTION_COMBINE, ATTENTION_PREFILL], ids=lambda f: f.name
)
def test_candidates_are_legal(family: Family) -> None:
    for kv in (KVSpec(8, 128, 128), KVSpec(1, 256, 256, 8), KVSpec(2, 192, 128)):
        for dtype in (torch.bfloat16, torch.float32):
            spec = AttentionSpec(8, kv, dtype, has_mask=True, has_chunk=True)
            for size in (1, 4, 1024):
                key = device_key(torch.device("cpu"))
                tiles = family.candidates(spec, size, key)
                assert family.heuristic(spec, size, key) in tiles
                for tile in tiles:
                    family.bind(spec, tile)


@pytest.mark.parametrize("family", [ATTENTION_DECODE, ATTENTION_PREFILL], ids=lambda f: f.name)
def test_generated_files_check_themselves(family: Family, device: torch.device) -> None:
    spec = AttentionSpec(4, KVSpec(2, 16, 16), torch.float32, has_chunk=True, causal=True)
    for each in (spec, dataclasses.replace(spec, has_window=True)):
        kernel = build(family, each, family.heuristic(each, 3, device_key(device)))
        run = subprocess.run([sys.executable, str(kernel.path)], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert "relative error" in run.stdout


def test_refused() -> None:
    call = make_call((20,), seq=2, mask=(1, 1))
    assert call.mask is not None
    wrong: dict[str, dict[str, Any]] = {
        "does not fit pages": {"q": call.q[:, :3]},
        "mask must be bool": {"mask": call.mask.float()},
        "B or 1, Hq or 1": {"mask": call.mask.expand(1, 3, 2, 20)},
        "pass k_chunk and v_chunk": {"k_chunk": call.q},
        "a chunk is": {"k_chunk": call.q, "v_chunk": call.q},
        "not a KV cache": {"kv_words": call.kv_words[:, :1]},
        "q must be": {"q": call.q.double()},
        "sinks is": {"sinks": torch.zeros(3)},
        "window=-1": {"window": -1},
    }
    for message, change in wrong.items():
        changed = Call(**{**vars(call), **change})
        with pytest.raises(ValueError, match=message):
            attention(*fields(changed), 4, False, 0.0, changed.sinks, changed.window)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("batch", "seq", "context", "dims", "group"),
    [
        (64, 1, 1024, (128, 128), 4),
        (4, 1, 16384, (128, 128), 8),
        (2, 4, 4096, (128, 128), 4),
        (1, 1, 16384, (128, 128), 1),
        (2, 1024, 3000, (128, 128), 4),
        (1, 1024, 1024, (192, 128), 1),
        (1, 300, 500, (256, 256), 2),
        (3, 1, 700, (256, 256), 2),
        (3, 1, 700, (64, 64), 6),
    ],
)
def test_large(
    batch: int,
    seq: int,
    context: int,
    dims: tuple[int, int],
    group: int,
    bits: Bits,
    masked: bool,
    device: torch.device,
) -> None:
    lengths = tuple(max(context - 37 * b, seq) for b in range(batch))
    pages = -(-context // PAGE) + 1
    call = make_call(
        lengths,
        bits=bits,
        dims=dims,
        group=group,
        seq=seq,
        chunk=seq > 1,
        pages=pages,
        mask=(1, 1) if masked else None,
        dtype=torch.bfloat16,
    )
    got, want = attend(call, device, bits, causal=True), exact(call, bits, causal=True)
    error = ((got.double() - want).norm() / want.norm()).item()
    assert error <= LIMIT[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("window", [1, 65, 128, 1024, 4096])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("seq", "chunk"), [(1, False), (4, True), (300, True), (700, False)])
def test_large_windows(
    window: int, bits: Bits, seq: int, chunk: bool, device: torch.device
) -> None:
    plain = make_call(
        (5000, 700, 1087), bits=bits, dims=(128, 128), group=4, seq=seq, chunk=chunk, pages=80,
        dtype=torch.bfloat16,
    )  # fmt: skip
    call = Call(**{**vars(plain), "window": window})
    got, want = attend(call, device, bits, causal=True), exact(call, bits, causal=True)
    assert ((got.double() - want).norm() / want.norm()).item() <= LIMIT[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("dims", [(64, 64), (256, 256)])
def test_large_softcap_and_sinks(dims: tuple[int, int], device: torch.device) -> None:
    for seq in (1, 700):
        call = make_call((1500, 900), dims=dims, group=4, seq=seq, pages=24, dtype=torch.bfloat16)
        sinks = torch.linspace(-2, 6, 8).bfloat16()
        call = Call(**{**vars(call), "softcap": 20.0, "sinks": sinks})
        got, want = attend(call, device, causal=True), exact(call, 4, causal=True)
        assert ((got.double() - want).norm() / want.norm()).item() <= LIMIT[torch.bfloat16]


@pytest.mark.gpu
def test_in_a_cuda_graph(device: torch.device) -> None:
    """Lengths are read on the device: a captured call follows them."""
    call = make_call((150, 100), dims=(128, 128), pages=4, dtype=torch.bfloat16)
    moved = moved_to(device, call)
    attention(*moved, 4, False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(*moved, 4, False)
    for lengths in ((150, 100), (3, 64), (65, 1)):
        moved[5].copy_(torch.tensor(lengths))
        call.length.copy_(torch.tensor(lengths))
        graph.replay()
        want = exact(call, 4, False)
        assert ((out.double().cpu() - want).norm() / want.norm()).item() <= 2e-3


@pytest.mark.gpu
def test_steps_share_one_compilation(device: torch.device) -> None:
    """Neither a longer mask nor another length or table compiles a kernel again."""
    kernels = {}
    for length in (64, 65, 100, 128, 177):
        call = make_call((length,), mask=(1, 1), dtype=torch.bfloat16, pages=1 + length // 50)
        attend(call, device)
        spec = AttentionSpec(4, KVSpec(2, 16, 16), torch.bfloat16, has_mask=True)
        kernel = dispatch.kernel_for(ATTENTION_DECODE, spec, 1, call.q.to(device).device)
        kernels[length] = len(kernel.fn.device_caches[torch.cuda.current_device()][0])
    assert len(set(kernels.values())) == 1, kernels
