"""The output head in 8 or 4 bit, on request: of its own weight, or of a copy of the embedding's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import qoqc
from qoqc.passes import manager
from qoqc.quant.activation import quantize_act
from qoqc.quant.weight import dequantize_weight, quantize_weight
from qoqc.quant.weight8 import quantize_weight8
from qoqc.runtime.weights import STORE
from qoqc.testing import VOCAB, capture, context, run_graph, sqnr, targets, tiny_model

IDS = torch.arange(3, 9)[None]


def rewritten(model: nn.Module, **options: Any) -> Any:
    gm, inputs = capture(model, IDS, use_cache=False)
    ctx = context(gm, inputs, **options)
    manager.run(gm, ctx)
    return gm, ctx


def model_of(tied: bool) -> Any:
    return tiny_model("llama", torch.bfloat16, tie_word_embeddings=tied, num_hidden_layers=1)


@pytest.mark.parametrize("tied", [False, True])
def test_16_bit_is_the_default(tied: bool) -> None:
    gm, ctx = rewritten(model_of(tied))
    assert targets(gm)["linear"] == 1
    (refusal,) = ctx.refusals
    assert refusal.kept
    assert refusal.reason == ("shares its weight with the embedding" if tied else "output head")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("kind", "decibels"), [("w8a8", 35.0), ("w4a8", 15.0)])
@pytest.mark.parametrize("group_size", [128, -1])
def test_quantized_head(tied: bool, kind: str, decibels: float, group_size: int) -> None:
    """The logits are the hidden state's with the rounded weight; all else is as it was."""
    model = model_of(tied)
    plain, plain_ctx = rewritten(model, exclude="model.layers.*")
    gm, ctx = rewritten(model, exclude="model.layers.*", lm_head=kind, group_size=group_size)
    assert (targets(plain)["linear"], targets(gm)["linear"]) == (8, 7)
    assert (ctx.counts["linear"], ctx.refusals[0].reason) == (1, "excluded")
    got, exact = run_graph(gm, ctx)[0], run_graph(plain, plain_ctx)[0]
    assert got.shape == (1, 6, VOCAB)
    noise = sqnr(exact.float(), got.float())
    assert decibels < noise < decibels + 15


def test_8_bit_weight_is_exact_in_the_4_bit_format() -> None:
    weight = torch.randn(200, 256)
    packed = quantize_weight8(weight)
    scale = weight.abs().amax(1) / 127
    w8 = torch.round(weight / scale[:, None])
    assert (packed.in_features, packed.out_features, packed.group_size) == (512, 200, 128)
    halves = (dequantize_weight(packed) / scale[:, None]).round().split(256, dim=1)
    assert torch.equal(halves[0] + halves[1], w8)
    assert torch.equal(halves[0] % 16, torch.zeros_like(w8))


def test_8_bit_head_is_the_integer_product() -> None:
    """Bit for bit what int8 weights and activations give."""
    head, table = nn.Linear(128, 384, bias=False), nn.Embedding(384, 128)
    gm, inputs = capture(lambda ids: head(table(ids)), IDS)
    ctx = context(gm, inputs, lm_head="w8a8")
    manager.run(gm, ctx)
    got = run_graph(gm, ctx)[0]
    xq, token_scale, _ = quantize_act(table(IDS))
    scale = head.weight.abs().amax(1) / 127
    w8 = torch.round(head.weight / scale[:, None])
    sums = (xq.double() @ w8.double().t()).float()
    assert torch.equal(got, sums * scale * token_scale[..., None])


def test_8_bit_wants_whole_groups() -> None:
    head, table = nn.Linear(96, 384), nn.Embedding(384, 96)
    gm, inputs = capture(lambda ids: head(table(ids)), IDS)
    ctx = context(gm, inputs, lm_head="w8a8")
    manager.run(gm, ctx)
    assert "96 input channels are no multiple of 128" in ctx.refusals[0].reason
    with pytest.raises(ValueError, match="no multiple of 128"):
        quantize_weight8(head.weight)


@pytest.mark.parametrize("kind", ["w8a8", "w4a8"])
@pytest.mark.parametrize("tied", [False, True])
def test_release_keeps_the_embedding(kind: str, tied: bool) -> None:
    torch._dynamo.reset()
    model = qoqc.compile(model_of(tied), glue="eager", release=True, lm_head=kind)
    for _ in range(2):  # prefill and decode, packed once
        out = model.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert out.shape == (1, 10)
    assert STORE.is_released(model.lm_head.weight) == (not tied)
    assert not STORE.is_released(model.model.embed_tokens.weight)
    assert len(STORE.bundles_of(model)) == 5


@pytest.mark.slow
def test_artifact_with_a_quantized_head(tmp_path: Any, model_dir: Any) -> None:
    """The head stays in 16 bit in the file and is packed after loading."""
    torch._dynamo.reset()
    loaded = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    model = qoqc.compile(loaded, glue="eager", lm_head="w4a8")
    expected = model.generate(IDS, max_new_tokens=6, do_sample=False)
    qoqc.save(model, tmp_path / "a")
    again = qoqc.load(tmp_path / "a", glue="eager")
    assert again.qoqc_options.lm_head == "w4a8"
    assert torch.equal(again.generate(IDS, max_new_tokens=6, do_sample=False), expected)


def test_4_bit_head_equals_a_packed_linear() -> None:
    head, table = nn.Linear(128, 384, bias=False), nn.Embedding(384, 128)
    gm, inputs = capture(lambda ids: head(table(ids)), IDS)
    ctx = context(gm, inputs, lm_head="w4a8")
    manager.run(gm, ctx)
    packed = ctx.store.packed(head.weight)
    assert packed is not None
    assert torch.equal(packed.qweight, quantize_weight(head.weight, 128).qweight)
