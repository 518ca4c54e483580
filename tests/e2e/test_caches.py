"""Every cache a user may bring, every way generate() treats one: same results as in eager mode.

With exclude="*" the linears stay exact, so that compiled and eager runs differ by fp32 noise only.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

import qoqc
from qoqc import pipeline
from qoqc.errors import CacheFull, OptionError, Unsupported
from qoqc.runtime.kv_cache import KV4Cache
from qoqc.testing import VOCAB, tiny_model

PROMPT, NEW = 10, 6
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}


@pytest.fixture(autouse=True)
def _fresh_graphs() -> None:
    torch._dynamo.reset()
    pipeline.reports.clear()


def prompts(batch: int, length: int = PROMPT) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(5))


def padded(batch: int, padding: int) -> dict[str, torch.Tensor]:
    """A batch whose first row is padded on the left."""
    ids = prompts(batch)
    mask = torch.ones_like(ids)
    ids[0, :padding], mask[0, :padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def new_tokens(model: Any, *args: Any, **kwargs: Any) -> list[list[int]]:
    tokens = model.generate(*args, **{**GREEDY, **kwargs})
    chosen: list[list[int]] = tokens[:, -NEW:].tolist()
    return chosen


def run(model: Any, cache: Any, chunks: list[tuple[int, int]]) -> torch.Tensor:
    """Logits of prompts(2) fed in chunks [start, stop)."""
    ids = prompts(2)
    with torch.no_grad():
        parts = [
            model(
                ids[:, start:stop],
                past_key_values=cache,
                use_cache=cache is not None,
                position_ids=torch.arange(start, stop)[None],
            ).logits
            for start, stop in chunks
        ]
    return torch.cat(parts, dim=1)


WHOLE = [(0, PROMPT)]
CHUNKED = [(0, 4), (4, 8), (8, 9), (9, PROMPT)]
KV4 = [(bits, kv) for bits in (4, 8) for kv in ("exact", "quantized")]


@pytest.mark.parametrize(("bits", "prefill_kv"), KV4)
def test_kv4_chunks_equal_eager(bits: Any, prefill_kv: Any) -> None:
    """First chunk, chunk with history, single tokens: fused against dequantize + SDPA."""
    eager = tiny_model("llama")
    model = qoqc.compile(tiny_model("llama"), glue="eager", exclude="*", prefill_kv=prefill_kv)
    expected = run(eager, KV4Cache(eager.config, 64, bits, prefill_kv), CHUNKED)
    got = run(model, KV4Cache(model.config, 64, bits, prefill_kv), CHUNKED)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert [r.counts["attention"] for r in pipeline.reports] == [0, 2, 2]


@pytest.mark.slow
@pytest.mark.parametrize("bits", [(4, 8), (16, 4), (4, 16)])
def test_layers_with_bits_of_their_own(bits: Any) -> None:
    """generate() with kv_layers is the eager model with a cache of these bits."""
    eager = tiny_model("llama")
    model = qoqc.compile(tiny_model("llama"), glue="eager", exclude="*", kv_layers=bits)
    cache = KV4Cache(eager.config, 64, bits)
    assert new_tokens(model, prompts(2)) == new_tokens(eager, prompts(2), past_key_values=cache)
    expected = run(eager, KV4Cache(eager.config, 64, bits), CHUNKED)
    got = run(model, KV4Cache(model.config, 64, bits), CHUNKED)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_bits_for_another_number_of_layers() -> None:
    with pytest.raises(OptionError, match="the bits of 3 layers, the model has 2"):
        qoqc.compile(tiny_model("llama"), kv_layers=(4, 8, 4))


def test_16bit_caches_agree() -> None:
    """Quantized linears behind DynamicCache, StaticCache and no cache give the same logits."""
    model = qoqc.compile(tiny_model("llama", num_hidden_layers=1), glue="eager")
    static = StaticCache(model.config, max_cache_len=16)
    logits = {
        "none": run(model, None, WHOLE),
        "static": run(model, static, [(0, 4), (4, 9), (9, PROMPT)]),
        "dynamic": run(model, DynamicCache(config=model.config), [(0, 4), (4, 9), (9, PROMPT)]),
    }
    for name, got in logits.items():
        torch.testing.assert_close(got, logits["none"], rtol=1e-4, atol=1e-4, msg=name)
    reasons = {r.reason for report in pipeline.reports for r in report.refusals}
    assert any(reason.startswith("reads a 16-bit cache") for reason in reasons)
    assert {report.counts["linear"] for report in pipeline.reports} == {7}


@pytest.mark.parametrize("kind", ["static", "dynamic", "none"])
def test_generate_with_16bit_caches(kind: str) -> None:
    choices: dict[str, dict[str, Any]] = {
        "static": {"cache_implementation": "static"},
        "dynamic": {"cache_implementation": "dynamic"},
        "none": {"use_cache": False},
    }
    choice = choices[kind]
    eager = new_tokens(tiny_model("llama"), **padded(2, 3), **choice)
    model = qoqc.compile(tiny_model("llama"), glue="eager", exclude="*", kv_bits=16)
    assert new_tokens(model, **padded(2, 3), **choice) == eager
    assert 1 <= len(pipeline.reports) <= 3


def test_quantized_prefill_without_a_cache() -> None:
    """prefill_kv="quantized": one forward sees the keys and values a cache would give back."""
    small = {"num_hidden_layers": 1}
    model = qoqc.compile(tiny_model("llama", **small), glue="eager", prefill_kv="quantized")
    whole = run(model, None, WHOLE)
    stepwise = run(model, KV4Cache(model.config, 64, 4, "quantized"), CHUNKED)
    torch.testing.assert_close(whole, stepwise, rtol=1e-4, atol=1e-4)
    exact = run(qoqc.compile(tiny_model("llama", **small), glue="eager"), None, WHOLE)
    assert not torch.allclose(whole, exact, rtol=1e-2, atol=1e-2)


def test_left_padding_changes_nothing() -> None:
    model = qoqc.compile(tiny_model("llama"), glue="eager")
    batch = padded(3, 4)
    together = new_tokens(model, **batch)
    alone = [
        new_tokens(model, row[mask.bool()][None])[0]
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert together == alone


def test_batches_and_lengths_share_graphs() -> None:
    """Prefill and decode, each for batch 1 and for any batch, and once more for any length."""
    model = qoqc.compile(tiny_model("llama"), glue="eager")
    shapes = [(batch, length) for batch in (1, 2, 3, 5) for length in (7, 9, 20, 33)]
    for shape in shapes:
        new_tokens(model, prompts(*shape))
    compiled = len(pipeline.reports)
    assert compiled <= 6
    for batch, length in shapes:
        new_tokens(model, prompts(batch, length + 3))
    assert len(pipeline.reports) == compiled


@pytest.mark.parametrize("returned", [1, 3])
def test_beam_search_equals_eager(returned: int) -> None:
    beams = {"num_beams": 3, "num_return_sequences": returned}
    eager = tiny_model("llama")
    expected = new_tokens(eager, prompts(2), past_key_values=KV4Cache(eager.config, 64), **beams)
    model = qoqc.compile(tiny_model("llama"), glue="eager", exclude="*")
    assert new_tokens(model, prompts(2), **beams) == expected
    assert len(expected) == 2 * returned
    greedy = new_tokens(eager, prompts(2), past_key_values=KV4Cache(eager.config, 64))
    assert expected[0] != greedy[0]  # so beams really changed places


def test_sampled_sequences_share_a_prompt() -> None:
    model = qoqc.compile(tiny_model("llama"), glue="eager")
    ids = prompts(1)
    out = model.generate(ids, num_return_sequences=4, do_sample=True, max_new_tokens=3)
    assert out.shape == (4, PROMPT + 3)
    assert (out[:, :PROMPT] == ids).all()


def test_reorder_moves_tokens_and_length() -> None:
    model = tiny_model("llama")
    cache = KV4Cache(model.config, 64)
    run(model, cache, WHOLE)
    layer = cache.layers[0]
    before = [x.clone() for x in (layer.k_pages, layer.v_pages, layer.kv_words)]
    cache.reorder_cache(torch.tensor([1, 1]))
    for old, new in zip(before, (layer.k_pages, layer.v_pages, layer.kv_words), strict=True):
        assert torch.equal(new[0], old[1])
        assert torch.equal(new[1], old[1])
        assert not torch.equal(old[0], old[1])


def test_cache_is_used_again() -> None:
    """A second generate() gives the same tokens, on the same storage, without a new graph."""
    model = qoqc.compile(tiny_model("llama"), glue="eager")
    first = new_tokens(model, prompts(2))
    graphs = len(pipeline.reports)
    other = new_tokens(model, prompts(2).flip(0))
    assert new_tokens(model, prompts(2)) == first
    assert other == first[::-1]
    assert len(pipeline.reports) == graphs


def test_own_cache_used_for_a_second_turn() -> None:
    """A conversation: the second generate() continues on the tokens of the first."""
    eager = tiny_model("llama")
    model = qoqc.compile(tiny_model("llama"), glue="eager", exclude="*")
    turns = []
    for each in (eager, model):
        cache = KV4Cache(each.config, 64)
        first = each.generate(prompts(1), past_key_values=cache, **GREEDY)
        longer = torch.cat((first, prompts(1, 5)), dim=1)
        turns.append(new_tokens(each, longer, past_key_values=cache))
    assert turns[0] == turns[1]


def test_full_cache_is_an_error() -> None:
    model = qoqc.compile(tiny_model("llama"), glue="eager")
    with pytest.raises(CacheFull, match="holds 64 tokens, token 65 was appended; allocate"):
        model.generate(
            prompts(1),
            past_key_values=KV4Cache(model.config, 64),
            max_new_tokens=60,
            eos_token_id=[],
        )


def test_crop_is_refused() -> None:
    model = qoqc.compile(tiny_model("llama"), glue="eager")
    with pytest.raises(Unsupported, match="cannot be cropped; assisted decoding needs kv_bits=16"):
        model.generate(prompts(1), assistant_model=tiny_model("llama"), **GREEDY)


def test_wrong_batch_is_an_error() -> None:
    model = tiny_model("llama")
    cache = KV4Cache(model.config, 64)
    run(model, cache, WHOLE)
    with pytest.raises(ValueError, match="allocated for a batch of 2, got 3 sequences"):
        with torch.no_grad():
            model(prompts(3), past_key_values=cache)


@pytest.mark.slow
def test_more_graphs_than_dynamo_allows_by_default() -> None:
    """Beyond its limit of 8 Dynamo would run the model uncompiled, without quantization."""
    model = qoqc.compile(tiny_model("llama", num_hidden_layers=1), glue="eager")
    for bits, prefill_kv in KV4[:3]:
        run(model, KV4Cache(model.config, 64, bits, prefill_kv), CHUNKED)
    assert len(pipeline.reports) == 9
