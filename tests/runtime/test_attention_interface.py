"""Soft caps and sinks as one op: adopted where they are, and equal to transformers' own eager."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import StaticCache

from qoqc.errors import Unsupported
from qoqc.ir import ops
from qoqc.runtime.attention_interface import NAME, adopt, attend
from qoqc.runtime.kv_cache import KV4Cache
from qoqc.testing import capture, targets, tiny_model

IDS = torch.arange(3, 14)[None]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
@pytest.mark.parametrize("padded", [False, True])
def test_logits_of_eager_attention(family: str, padded: bool) -> None:
    """Sliding windows of 8 tokens and masks are in both; linears and numbers are fp32."""
    eager, ours = tiny_model(family), tiny_model(family)
    eager.set_attn_implementation("eager")
    assert adopt(ours)
    assert ours.config._attn_implementation == NAME
    mask = torch.ones_like(IDS)
    mask[:, : 3 * padded] = 0
    with torch.no_grad():
        want, got = (model(IDS, attention_mask=mask).logits for model in (eager, ours))
    live = mask.bool()
    torch.testing.assert_close(got[live], want[live], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_steps_over_caches(family: str) -> None:
    """A chunk and single tokens: a static cache gives what no cache gives, KV8 comes near."""
    model = tiny_model(family)
    adopt(model)
    with torch.no_grad():
        whole = model(IDS).logits
        for cache, limit in (
            (StaticCache(model.config, max_cache_len=64), 1e-4),
            (KV4Cache(model.config, 64, 8), 0.1),
        ):
            parts = [
                model(IDS[:, a:b], past_key_values=cache, position_ids=torch.arange(a, b)[None])
                for a, b in ((0, 6), (6, 9), (9, 10), (10, 11))
            ]
            got = torch.cat([part.logits for part in parts], dim=1)
            assert (got - whole).norm() < limit * whole.norm()


def test_it_is_one_op_in_a_graph() -> None:
    model = tiny_model("gemma2")
    adopt(model)
    gm, _ = capture(model, IDS, use_cache=False)
    calls = targets(gm)
    assert calls["attention"] == 2
    assert calls["softmax"] == calls["scaled_dot_product_attention"] == 0


@pytest.mark.parametrize("family", ["llama", "qwen3", "bloom", "gemma3_text"])
def test_others_keep_theirs(family: str) -> None:
    model = tiny_model(family)
    before = model.config._attn_implementation
    assert not adopt(model)
    assert model.config._attn_implementation == before


def test_what_a_user_chose_stays() -> None:
    model = tiny_model("gemma2")
    model.set_attn_implementation("flex_attention")
    assert not adopt(model)
    assert model.config._attn_implementation == "flex_attention"


def reference(q: Any, k: Any, v: Any, mask: Any, sinks: Any, scale: float, cap: float) -> Any:
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1).double() for x in (k, v))
    scores = q.double() @ k.transpose(-1, -2) * scale
    scores = cap * torch.tanh(scores / cap)
    column = sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    scores = torch.cat((scores.masked_fill(~mask, -torch.inf), column), -1)
    return scores.softmax(-1)[..., :-1] @ v


def test_masks_bool_added_and_causal() -> None:
    q, k, v = randn(2, 4, 3, 8), randn(2, 2, 5, 8, seed=1), randn(2, 2, 5, 6, seed=2)
    sinks, module = randn(4, seed=3), SimpleNamespace(is_causal=True)
    past = torch.arange(5) <= torch.arange(3)[:, None]  # as SDPA has it
    added = torch.zeros(1, 1, 3, 5).masked_fill(~past, -torch.inf)
    want = reference(q, k, v, past, sinks, 0.3, 1.5)
    for mask in (None, past[None, None], added):
        out, weights = attend(module, q, k, v, mask, scaling=0.3, softcap=1.5, s_aux=sinks)
        assert weights is None
        torch.testing.assert_close(out.transpose(1, 2).double(), want, rtol=1e-5, atol=1e-6)


def test_a_query_that_sees_nothing_gives_zero() -> None:
    q, k = randn(1, 2, 2, 8), randn(1, 2, 3, 8, seed=1)
    mask = torch.tensor([[True, True, False], [False, False, False]])[None, None]
    out = ops.attention(q, k, k, mask, None, 1.0, 0.0, False)
    assert not out.isnan().any()
    assert (out[:, :, 1] == 0).all()
    assert (out[:, :, 0] != 0).any()


@pytest.mark.parametrize("extra", [{"dropout": 0.1}, {"position_bias": randn(1, 2, 2, 2)}])
def test_refused(extra: dict[str, Any]) -> None:
    q, module = randn(1, 2, 2, 8), torch.nn.Module()
    with pytest.raises(Unsupported, match="cannot run as 'qoqc'; use model.set_attn"):
        attend(module, q, q, q, None, **extra)


def test_the_op_keeps_its_schema() -> None:
    q, k = randn(1, 4, 2, 8), randn(1, 2, 3, 8, seed=1)
    torch.library.opcheck(ops.attention, (q, k, k, None, randn(4), 1.0, 20.0, True))
