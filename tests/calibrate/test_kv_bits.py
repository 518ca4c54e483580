"""KV bits by attention error: the error against torch's attention, and who gets how many bits."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from qoqc.calibrate.kv_bits import (
    LIMIT,
    Bits,
    KVChoice,
    attention,
    attention_error,
    choose_kv_bits,
    spend_bits,
)
from qoqc.errors import Unsupported
from qoqc.quant.kv import fake_quantize_kv

Sample = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
CAUSAL = attention(scale=1 / math.sqrt(32))


def sample(kv_heads: int = 2, seq: int = 48, seed: int = 0) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 4, seq, 32, generator=generator)
    k = torch.randn(2, kv_heads, seq, 32, generator=generator)
    v = torch.randn(2, kv_heads, seq, 16, generator=generator)
    return q, k, v


# attention itself


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_it_is_torchs_attention(kv_heads: int) -> None:
    q, k, v = sample(kv_heads)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(CAUSAL(q, k, v), expected, rtol=1e-4, atol=1e-5)


def test_the_last_queries_of_a_longer_text() -> None:
    q, k, v = sample()
    whole = CAUSAL(q, k, v)
    torch.testing.assert_close(CAUSAL(q[:, :, 40:], k, v), whole[:, :, 40:], rtol=1e-4, atol=1e-5)


def test_bool_and_float_masks_agree() -> None:
    q, k, v = sample()
    seen = torch.rand(2, 1, 48, 48, generator=torch.Generator().manual_seed(1)) > 0.3
    seen[..., 0] = True
    added = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    outs = [attention(scale=0.2, mask=mask, causal=False)(q, k, v) for mask in (seen, added)]
    torch.testing.assert_close(outs[0], outs[1])
    expected = F.scaled_dot_product_attention(q, k, v, seen, scale=0.2, enable_gqa=True)
    torch.testing.assert_close(outs[0], expected, rtol=1e-4, atol=1e-5)


def test_a_query_that_sees_nothing_gives_zeros() -> None:
    q, k, v = sample()
    seen = torch.ones(48, 48, dtype=torch.bool)
    seen[5] = False
    out = attention(scale=0.2, mask=seen)(q, k, v)
    assert not out[:, :, 5].any()
    assert bool(torch.isfinite(out).all())


def test_softcap_bounds_the_scores() -> None:
    q, k, v = sample()
    free = attention(scale=0.2)(q, k, v)
    wide = attention(scale=0.2, softcap=1e4)(q, k, v)
    torch.testing.assert_close(free, wide, rtol=1e-3, atol=1e-4)
    flat = attention(scale=0.2, softcap=1e-6, causal=False)(q, k, v)
    mean = v.repeat_interleave(2, 1).mean(2, keepdim=True).expand(flat.shape)
    torch.testing.assert_close(flat, mean, rtol=1e-4, atol=1e-5)


# the error


def test_the_error_is_that_of_the_worst_head() -> None:
    q, k, v = sample()
    exact = CAUSAL(q, k, v).double()
    rounded = CAUSAL(q, fake_quantize_kv(k, 4), fake_quantize_kv(v, 4)).double()
    heads = [float((rounded[:, h] - exact[:, h]).norm() / exact[:, h].norm()) for h in range(4)]
    assert attention_error(q, k, v, 4, CAUSAL) == pytest.approx(max(heads), rel=1e-6)


def test_more_bits_are_closer_and_a_constant_is_exact() -> None:
    q, k, v = sample()
    four, eight = (attention_error(q, k, v, bits, CAUSAL) for bits in (4, 8))
    assert 0.02 < four < 0.3
    assert eight < four / 8
    flat = attention_error(q, torch.ones_like(k), torch.full_like(v, 0.5), 4, CAUSAL)
    assert flat == 0


def test_heads_that_give_zeros_do_not_divide_by_them() -> None:
    q, k, v = sample()
    assert attention_error(q, k, v * 0, 4, CAUSAL) == 0


# the choice


def test_ordinary_keys_get_4_bits() -> None:
    choice = choose_kv_bits(*sample(), CAUSAL, "layers.0")
    assert choice.bits == 4
    assert set(choice.errors) == {4}
    assert choice.errors[4] <= LIMIT
    assert choice.reason == f"attention error {choice.errors[4]:.3f} with KV4 (limit {LIMIT:g})"


def test_a_key_bias_like_qwen2s_gets_8_bits() -> None:
    q, k, v = sample()
    k[..., [13, 29]] += 30.0
    choice = choose_kv_bits(q, k, v, CAUSAL, "layers.0")
    assert choice.bits == 8
    assert choice.errors[4] > LIMIT >= choice.errors[8]
    assert "with KV4, " in choice.reason
    assert "with KV8 (limit" in choice.reason


def test_a_bias_beyond_8_bits_leaves_16() -> None:
    q, k, v = sample()
    k[..., [13, 29]] += 3000.0
    choice = choose_kv_bits(q, k, v, CAUSAL, "layers.0")
    assert choice.bits == 16
    assert choice.errors[8] > LIMIT


def test_one_bad_head_is_enough() -> None:
    q, k, v = sample(4)
    k[:, 2, :, 5] += 60.0
    assert choose_kv_bits(q, k, v, CAUSAL, "layers.0").bits == 8


def test_limit_and_start_are_the_callers() -> None:
    data = sample()
    assert choose_kv_bits(*data, CAUSAL, "a", limit=0.001).bits == 16
    assert choose_kv_bits(*data, CAUSAL, "a", limit=0.02).bits == 8
    late = choose_kv_bits(*data, CAUSAL, "a", start=8)
    assert late.bits == 8
    assert set(late.errors) == {8}
    assert choose_kv_bits(*data, CAUSAL, "a", start=16).reason == "16 bits asked for"


@pytest.mark.parametrize("which", [0, 1, 2])
def test_samples_that_are_not_finite_are_refused_by_name(which: int) -> None:
    data = sample()
    data[which][0, 0, 3, 3] = float("nan")
    what = ("queries", "keys", "values")[which]
    with pytest.raises(Unsupported, match=rf"layers\.4: the calibration {what} hold NaN"):
        choose_kv_bits(*data, CAUSAL, "layers.4")


def test_the_choice_keeps_no_autograd_graph_alive() -> None:
    q, k, v = sample()
    choice = choose_kv_bits(q.requires_grad_(), k, v, CAUSAL, "a")
    assert isinstance(choice.errors[4], float)


def choices(*errors: float, bits: Bits = 4) -> list[KVChoice]:
    return [KVChoice(f"layers.{i}", bits, {4: error}, "r") for i, error in enumerate(errors)]


@pytest.mark.parametrize(
    ("average", "expected"),
    [
        (4.0, [4, 4, 4, 4]),
        (4.9, [4, 4, 4, 4]),
        (5.0, [4, 8, 4, 4]),
        (6.0, [4, 8, 4, 8]),
        (9.0, [8, 8, 8, 8]),
        (3.0, [4, 4, 4, 4]),
    ],
)
def test_spare_bits_go_to_the_largest_errors(average: float, expected: list[int]) -> None:
    found = spend_bits(choices(0.1, 0.3, 0.15, 0.2), average)
    assert [choice.bits for choice in found] == expected
    for choice, before in zip(found, choices(0.1, 0.3, 0.15, 0.2), strict=True):
        assert (choice == before) is (choice.bits == 4)
        assert choice.bits == 4 or f"within an average of {average:g}" in choice.reason


def test_what_8_and_16_bit_layers_take_is_counted() -> None:
    layers = [*choices(0.5, bits=8), *choices(0.1, 0.3, 0.2)]
    assert [choice.bits for choice in spend_bits(layers, 6.0)] == [8, 4, 8, 4]
    layers = [*choices(0.9, bits=16), *choices(0.1, 0.3, 0.2)]
    assert spend_bits(layers, 6.0) == tuple(layers)
    assert spend_bits([], 4.5) == ()
