"""Head norm and rotation against transformers' own, and a decode step against its parts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as cohere_rotary
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rotary
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from qoqc.ir import kv_reference, ops, rotary
from qoqc.quant.kv import empty_pages

LENGTHS = (0, 63, 100)
GRID: tuple[Any, ...] = ("half", 1e-6, 0.0, True)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def angles(batch: int, seq: int, width: int, form: str) -> tuple[torch.Tensor, torch.Tensor]:
    half = randn(batch, seq, width // 2, seed=5)
    both = torch.cat((half, half), -1) if form == "half" else half.repeat_interleave(2, -1)
    return both.cos(), both.sin()


@pytest.mark.parametrize("form", ["half", "interleaved"])
def test_rotate_equals_transformers(form: str) -> None:
    q, k = randn(2, 4, 5, 16), randn(2, 2, 5, 16, seed=1)
    cos, sin = angles(2, 5, 16, form)
    theirs = llama_rotary if form == "half" else cohere_rotary
    expected = theirs(q, k, cos, sin)
    for x, y in zip((q, k), expected, strict=True):
        torch.testing.assert_close(rotary.rotate(x, cos, sin, form), y, rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", ["half", "interleaved"])
def test_rotation_keeps_lengths_and_the_channels_behind_it(form: str) -> None:
    x = randn(2, 3, 5, 24)
    cos, sin = angles(1, 5, 16, form)
    y = rotary.rotate(x, cos, sin, form)
    assert torch.equal(y[..., 16:], x[..., 16:])
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    assert not torch.allclose(y[..., :16], x[..., :16])


def test_rotation_is_rounded_once() -> None:
    x = randn(1, 2, 3, 16).bfloat16()
    cos, sin = angles(1, 3, 16, "half")
    exact = rotary.rotate(x.double(), cos.double(), sin.double(), "half")
    assert torch.equal(rotary.rotate(x, cos, sin, "half"), exact.to(torch.bfloat16))


def test_head_norm_comes_before_rotation() -> None:
    x = randn(2, 3, 5, 16)
    module = Qwen3RMSNorm(16, eps=1e-6)
    torch.nn.init.normal_(module.weight)
    cos, sin = angles(2, 5, 16, "half")
    with torch.no_grad():
        expected = llama_rotary(module(x), x, cos, sin)[0]
        found = rotary.prepare(x, module.weight, cos, sin, *GRID)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


class Step:
    """A cache with LENGTHS tokens in its sequences, and a new token for each."""

    def __init__(self, bits: int = 4) -> None:
        self.bits, self.batch = bits, len(LENGTHS)
        self.pages = empty_pages(self.batch * 2, 2, 16, 8, bits, "cpu")
        table = torch.tensor([5, 0, 3, 2, 4, 1], dtype=torch.int32)
        self.table = table.view(self.batch, 2)
        self.length = torch.tensor(LENGTHS)
        old = (randn(self.batch, 2, 100, 16, seed=3), randn(self.batch, 2, 100, 8, seed=4))
        start = torch.zeros(self.batch, dtype=torch.long)
        kv_reference.kv_append(*self.pages, self.table, start, *old, bits)
        self.q, self.k = randn(self.batch, 4, 1, 16), randn(self.batch, 2, 1, 16, seed=1)
        self.v = randn(self.batch, 2, 1, 8, seed=2)
        self.cos, self.sin = angles(self.batch, 1, 16, "half")

    def run(self, softcap: float = 0.0, sinks: torch.Tensor | None = None) -> torch.Tensor:
        out: torch.Tensor = ops.kv4_decode(
            self.q, self.k, self.v, None, None, self.cos, self.sin, *self.pages, self.table,
            self.length, None, sinks, *GRID, 0.25, softcap, self.bits,
        )  # fmt: skip
        return out


@pytest.mark.parametrize("bits", [4, 8])
def test_decode_is_rotation_append_and_attention(bits: int) -> None:
    one, apart = Step(bits), Step(bits)
    out = one.run()
    q, k = (
        rotary.rotate(apart.q, apart.cos, apart.sin, "half"),
        rotary.rotate(apart.k, apart.cos, apart.sin, "half"),
    )
    ops.kv4_append(*apart.pages, apart.table, apart.length, k, apart.v, bits)
    apart.length += 1
    expected = ops.kv4_attention(
        q, *apart.pages, apart.table, apart.length, None, None, None, 0.25, bits, False
    )
    assert torch.equal(out, expected)
    assert one.length.tolist() == [n + 1 for n in LENGTHS]
    for x, y in zip(one.pages, apart.pages, strict=True):
        assert torch.equal(x, y)


def test_softcap_and_sinks_equal_a_loop() -> None:
    step, sinks = Step(), randn(4, seed=9)
    out = step.run(softcap=0.5, sinks=sinks)
    k, v = kv_reference.kv_read(*step.pages, step.table, 4)
    q = rotary.rotate(step.q, step.cos, step.sin, "half")
    for b, length in enumerate(step.length.tolist()):
        for head in range(4):
            scores = (k[b, head // 2, :length] @ q[b, head, 0] * 0.25).tolist()
            weights = [math.exp(0.5 * math.tanh(s / 0.5)) for s in scores]
            total = sum(weights) + math.exp(float(sinks[head]))
            want = sum(w / total * v[b, head // 2, t] for t, w in enumerate(weights))
            torch.testing.assert_close(out[b, head, 0], want, rtol=1e-5, atol=1e-6)


def test_decode_takes_one_token() -> None:
    step = Step()
    step.q = step.q.expand(-1, -1, 2, -1)
    with pytest.raises(ValueError, match="one new token"):
        step.run()


def test_the_ops_write_what_their_schema_says() -> None:
    step = Step()
    pages = (*step.pages, step.table)
    torch.library.opcheck(
        ops.kv4_decode,
        (step.q, step.k, step.v, None, None, step.cos, step.sin, *pages, step.length, None, None,
         *GRID, 0.25, 0.0, 4),
    )  # fmt: skip
    torch.library.opcheck(
        ops.kv4_rotate_append,
        (step.q, step.k, step.v, None, None, step.cos, step.sin, *pages, step.length, *GRID, 4),
    )
