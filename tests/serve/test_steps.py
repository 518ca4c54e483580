"""Attention of a step against its definition: every token over its request's quantized tokens."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from qoqc.codegen import dispatch
from qoqc.ir import kv_reference, ops
from qoqc.ir.spec import PAGE, KVSpec
from qoqc.quant.kv import fake_quantize_kv
from qoqc.serve import attention
from qoqc.serve.pages import PADDING_PAGE, PageBytes, Pages
from qoqc.serve.ragged import RaggedStep, Rows
from qoqc.serve.tiled import TiledStep
from qoqc.serve.work import Work, warm_sizes

CPU = torch.device("cpu")
HEADS = 4
SPECS = (KVSpec(2, 32, 32, 4), KVSpec(2, 32, 16, 8))
PLAIN: dict[str, Any] = {"scale": 0.2, "softcap": 0.0, "window": 0, "sinks": None}
SPECIAL: dict[str, Any] = {"scale": 0.2, "softcap": 5.0, "window": 30, "sinks": torch.ones(HEADS)}


@dataclasses.dataclass
class Sequence:
    """All tokens of a request in one layer, and its pages."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    blocks: list[int]

    def between(self, start: int, stop: int) -> tuple[torch.Tensor, ...]:
        return tuple(x[:, :, start:stop] for x in (self.q, self.k, self.v))


def sequences(spec: KVSpec, lengths: list[int]) -> list[Sequence]:
    generator = torch.Generator().manual_seed(3)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    pages = torch.randperm(30, generator=generator) + 1
    made = []
    for n in lengths:
        own, pages = pages[: -(-n // PAGE)], pages[-(-n // PAGE) :]
        q, k = randn(1, HEADS, n, spec.k_dim), randn(1, spec.kv_heads, n, spec.k_dim)
        made.append(Sequence(q, k, randn(1, spec.kv_heads, n, spec.v_dim), own.tolist()))
    return made


def defined(whole: Sequence, bits: int, **kind: Any) -> torch.Tensor:
    """What all tokens of a sequence get, [n, Hq, Dv]."""
    n = whole.q.shape[2]
    mask = None
    if kind["window"]:
        mask = (torch.arange(n) > torch.arange(n)[:, None] - kind["window"])[None, None]
    k, v = fake_quantize_kv(whole.k, bits), fake_quantize_kv(whole.v, bits)
    out = kv_reference.attention(
        whole.q, k, v, mask, kind["sinks"], kind["scale"], kind["softcap"], True
    )
    return out[0].transpose(0, 1)


def make(tiled: bool, pages: Pages, works: list[Work], tokens: int) -> attention.Step:
    if tiled:
        return TiledStep(pages, works, tokens)
    return RaggedStep(pages, Rows(8, 10, len(pages.layers), pages.device), works, tokens)


def run(
    tiled: bool,
    layer: int,
    whole: list[Sequence],
    steps: list[list[int]],
    device: torch.device = CPU,
    **kind: Any,
) -> list[torch.Tensor]:
    """Outputs of all tokens, as steps in which request i gets steps[..][i] more tokens."""
    pages = Pages(SPECS, 30, device)
    kind = {key: x.to(device) if torch.is_tensor(x) else x for key, x in kind.items()}
    for tensor in pages.layers[layer].tensors[2:]:
        tensor.fill_(0x7E007E00)  # as if all pages were left by requests that ended in NaN
    done = [0] * len(whole)
    outputs: list[list[torch.Tensor]] = [[] for _ in whole]
    for counts in steps:
        taking = [i for i, count in enumerate(counts) if count]
        works = [Work(whole[i].blocks, done[i], counts[i]) for i in taking]
        parts = [whole[i].between(done[i], done[i] + counts[i]) for i in taking]
        row = [torch.cat(x, dim=2) for x in zip(*parts, strict=True)]
        tokens = sum(counts)
        filled = [F.pad(x, (0, 0, 0, 3), value=torch.nan).to(device) for x in row]
        out = make(tiled, pages, works, tokens + 3).attend(layer, *filled, **kind).cpu()
        assert out.shape[:2] == (1, tokens + 3)
        first = 0
        for i in taking:
            outputs[i].append(out[0, first : first + counts[i]])
            first += counts[i]
            done[i] += counts[i]
    return [torch.cat(parts) for parts in outputs]


CUTS = [
    [[70, 1, 64, 200]],
    [[30, 0, 1, 0], [1, 1, 1, 100], [1, 0, 62, 37], [38, 0, 0, 63]],
    [[64, 1, 0, 199], [5, 0, 0, 1], [1, 0, 64, 0]],
]


@pytest.mark.parametrize("kind", [PLAIN, SPECIAL], ids=["plain", "special"])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("tiled", [True, False])
def test_every_token_attends_to_its_request_and_nothing_else(
    tiled: bool, layer: int, kind: dict[str, Any]
) -> None:
    whole = sequences(SPECS[layer], [70, 1, 64, 200])
    for steps in CUTS:
        found = run(tiled, layer, whole, steps, **kind)
        for sequence, out in zip(whole, found, strict=True):
            wanted = defined(sequence, SPECS[layer].bits, **kind)
            # sums of 200 products of size 1 in fp32, in another order
            torch.testing.assert_close(out, wanted, atol=2e-6, rtol=1e-5)


def test_tiles_have_the_same_bits_however_a_prompt_is_cut() -> None:
    whole = sequences(SPECS[0], [70, 1, 64, 200])
    wanted = run(True, 0, whole, CUTS[0], **PLAIN)
    for steps in CUTS[1:]:
        assert all(map(torch.equal, run(True, 0, whole, steps, **PLAIN), wanted))
    for i, sequence in enumerate(whole):
        (by_itself,) = run(True, 0, [sequence], [[sequence.q.shape[2]]], **PLAIN)
        assert torch.equal(by_itself, wanted[i])


def test_the_kernels_take_what_steps_give_them(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("kv4_append", "kv4_decode", "kv4_attention")
    kernels = {name: dispatch.IMPLEMENTATIONS[name] for name in names}
    for module in ("ragged", "tiled"):
        replaced = SimpleNamespace(**kernels, kv4_round=ops.kv4_round)
        monkeypatch.setattr(f"qoqc.serve.{module}.ops", replaced)
    whole = sequences(SPECS[0], [70, 3])
    cuts = [[66, 1], [1, 1], [3, 1]], [[70, 3]]
    found = [run(True, 0, whole, steps, device, **SPECIAL) for steps in cuts]
    assert all(map(torch.equal, *found))
    found.append(run(False, 0, whole, cuts[0], device, **SPECIAL))
    for outputs in found[1:]:
        for sequence, out in zip(whole, outputs, strict=True):
            # fp32 products of GPUs are three of tf32, their tanh and exp2 are approximate
            wanted = defined(sequence, SPECS[0].bits, **SPECIAL)
            torch.testing.assert_close(out, wanted, atol=1e-4, rtol=0)


def test_rows_that_fill_up_a_batch_touch_the_padding_page_only() -> None:
    pages = Pages(SPECS, 4, torch.device("cpu"))
    rows = Rows(8, 4, len(SPECS), pages.device)
    rows.fill([Work([3], 5, 1)] * 8, 8)
    step = RaggedStep(pages, rows, [Work([2, 4], 64, 1)], tokens=6)
    q, k, v = torch.randn(1, HEADS, 6, 32), torch.randn(1, 2, 6, 32), torch.randn(1, 2, 6, 32)
    step.attend(0, q, k, v, **PLAIN)
    written = [i for i, words in enumerate(pages.layers[0].kv_words) if words.any()]
    assert written == [PADDING_PAGE, 4]


def test_pages_are_copied_as_the_rows_of_one_matrix() -> None:
    pages = Pages(SPECS, 3, torch.device("cpu"))
    for layer in pages.layers:
        for tensor in layer.tensors:
            tensor.copy_(torch.randint(0, 200, tensor.shape))
    matrix = PageBytes(pages)
    rows = matrix.index_select(0, torch.tensor([1, 3]))
    assert rows.shape == (2, pages.nbytes // 4) and rows.dtype is torch.uint8
    matrix.index_copy_(0, torch.tensor([2, 0]), rows)
    for layer in pages.layers:
        for tensor in layer.tensors:
            assert torch.equal(tensor[2], tensor[1])
            assert torch.equal(tensor[0], tensor[3])
            assert not torch.equal(tensor[0], tensor[1])


def test_a_gpu_is_warmed_up_for_every_choice_of_tiles() -> None:
    sizes = warm_sizes(100, torch.device("cuda"))
    assert sizes == [2, 3, 4, 7, 8, 15, 16, 31, 32, 63, 64, 99, 100]
    assert warm_sizes(8192, torch.device("cuda"))[-2:] == [8191, 8192]
    assert warm_sizes(8, torch.device("cpu")) == [8]
