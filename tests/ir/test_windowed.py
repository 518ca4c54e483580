"""Attention with a window, among the tokens of a prompt."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses import FakeTensorMode

from qoqc.ir import windowed
from qoqc.ir.windowed import window_attention

SCALE = 0.3


def heads(count: int, seq: int, size: int, seed: int) -> torch.Tensor:
    """[2, count, seq, size], as a projection leaves them: heads side by side."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, seq, count, size, generator=generator).transpose(1, 2)


def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    group = q.shape[1] // k.shape[1]
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=torch.float64)
    for head in range(q.shape[1]):
        for i in range(q.shape[2]):
            seen = slice(max(i - window + 1, 0), i + 1)
            keys, values = (x[:, head // group, seen].double() for x in (k, v))
            scores = torch.einsum("bd,btd->bt", q[:, head, i].double(), keys) * SCALE
            out[:, head, i] = torch.einsum("bt,btd->bd", scores.softmax(-1), values)
    return out


@pytest.mark.parametrize("window", [1, 5, 13, 100])
def test_a_query_sees_the_last_keys(window: int) -> None:
    q, k, v = heads(4, 13, 16, 0), heads(2, 13, 16, 1), heads(2, 13, 24, 2)
    got = window_attention(q, k, v, SCALE, window)
    torch.testing.assert_close(got.double(), by_hand(q, k, v, window), rtol=1e-5, atol=1e-5)


def test_fake_agrees_with_real() -> None:
    args = (heads(4, 13, 16, 0), heads(2, 13, 16, 1), heads(2, 13, 24, 2))
    results = torch.library.opcheck(window_attention, (*args, SCALE, 5))
    assert set(results.values()) == {"SUCCESS"}
    with FakeTensorMode() as mode:
        fake = window_attention(*map(mode.from_tensor, args), SCALE, 5)
    real = window_attention(*args, SCALE, 5)
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
    assert real.transpose(1, 2).is_contiguous()


def test_torchs_flash_attention_takes_windows() -> None:
    """A private call of torch's: fails where a release moves it."""
    schema = torch.ops.aten._flash_attention_forward.default._schema
    names = [argument.name for argument in schema.arguments]
    assert names[:10] == [
        *("query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k"),
        *("dropout_p", "is_causal", "return_debug_mask"),
    ]
    assert {"scale", "window_size_left", "window_size_right"} <= set(names)


@pytest.mark.gpu
@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("size", [64, 80, 128, 256])
@pytest.mark.parametrize(("seq", "window"), [(13, 5), (700, 128), (1000, 999), (513, 1)])
def test_flash_attention(
    size: int,
    seq: int,
    window: int,
    rotated: bool,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q, k, v = (
        heads(count, seq, size, seed).to(device, torch.bfloat16)
        for seed, count in enumerate((8, 2, 2))
    )
    if rotated:  # as kv4_rotate_append leaves them
        q, k = q.contiguous(), k.contiguous()
    got = window_attention(q, k, v, SCALE / math.sqrt(size), window)
    monkeypatch.setattr(windowed, "FLASH_HEADS", ())
    wide = [x.float() for x in (q, k, v)]
    expected = window_attention(*wide, SCALE / math.sqrt(size), window)
    assert (got.shape, got.stride()) == (expected.shape, expected.stride())
    torch.testing.assert_close(got.float(), expected, rtol=2e-2, atol=2e-2)
