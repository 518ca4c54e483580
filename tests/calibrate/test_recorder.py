"""The cache that keeps no past: it rounds, remembers, and never hides a NaN."""

from __future__ import annotations

import pytest
import torch

from qoqc.calibrate.recorder import Recorder
from qoqc.errors import Unsupported
from qoqc.quant.kv import fake_quantize_kv
from qoqc.testing import tiny_model

K = torch.randn(1, 2, 5, 32, generator=torch.Generator().manual_seed(0))
V = torch.randn(1, 2, 5, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bits", [4, 8])
def test_it_gives_back_what_a_cache_would(bits: int) -> None:
    recorder = Recorder(2)
    recorder.bits = bits
    for got, x in zip(recorder.update(K, V, 1), (K, V), strict=True):
        assert torch.equal(got, fake_quantize_kv(x, bits))
    assert recorder.k is K
    assert recorder.v is V
    recorder.forget()
    assert recorder.k is None


def test_16_bits_are_left_alone() -> None:
    got = Recorder(2).update(K, V, 0)
    assert got[0] is K
    assert got[1] is V


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("what", ["keys", "values"])
def test_nan_names_the_layer(what: str, value: float) -> None:
    recorder, bad = Recorder(2), K.clone()
    bad[0, 1, 2, 3] = value
    pair = (bad, V) if what == "keys" else (K, bad)
    with pytest.raises(Unsupported, match=f"layer 1: the calibration {what} hold NaN or infinity"):
        recorder.update(*pair, 1)
    recorder.name = "model.layers.1"
    with pytest.raises(Unsupported, match=r"model\.layers\.1: the calibration"):
        recorder.update(*pair, 1)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt2"])
def test_a_model_does_with_it_what_it_does_without(family: str) -> None:
    model = tiny_model(family)
    tokens = torch.arange(3, 23)[None]
    with torch.no_grad():
        plain = model(input_ids=tokens, use_cache=False).logits
        recorder = Recorder(model.config.num_hidden_layers)
        got = model(input_ids=tokens, past_key_values=recorder, use_cache=True).logits
        again = model(input_ids=tokens, past_key_values=recorder, use_cache=True).logits
    torch.testing.assert_close(got, plain)
    assert torch.equal(again, got), "nothing is kept from one text to the next"
