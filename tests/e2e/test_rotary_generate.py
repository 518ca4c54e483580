"""Greedy generation with rotation, append and attention as one op gives the eager model's tokens.

The linears stay exact and the numbers fp32, so that nothing but the fused ops is under test.
"""

from __future__ import annotations

import pytest
import torch

import qoqc
from qoqc import pipeline
from qoqc.runtime.kv_cache import KV4Cache
from qoqc.testing import VOCAB, tiny_model

PROMPT, NEW = 10, 6

FAMILIES = {
    "llama": "half",
    "qwen3": "half, normed",
    "cohere": "interleaved",
    "phi": "half of the channels",
    "gpt_neox": "a quarter of the channels",
    "gpt2": "none",
}


def greedy(model: object, cache: object = None) -> list[list[int]]:
    ids = torch.randint(3, VOCAB, (2, PROMPT), generator=torch.Generator().manual_seed(5))
    given = {} if cache is None else {"past_key_values": cache}
    out = model.generate(  # type: ignore[attr-defined]
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        **given,
    )
    chosen: list[list[int]] = out[:, -NEW:].tolist()
    return chosen


@pytest.mark.parametrize("family", FAMILIES, ids=FAMILIES.get)
def test_tokens_of_the_eager_model(family: str) -> None:
    torch._dynamo.reset()
    pipeline.reports.clear()
    eager = tiny_model(family)
    expected = greedy(eager, KV4Cache(eager.config, 64))
    model = qoqc.compile(tiny_model(family), glue="eager", exclude="*")
    assert greedy(model) == expected
    prefill, decode = pipeline.reports
    assert prefill.counts["rotary"] == (0 if family == "gpt2" else 2)
    assert decode.counts["rotary"] == 2
