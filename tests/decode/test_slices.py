"""Prompts of large batches run some sequences at a time, and nobody can tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

import qoqc
from qoqc.decode import slices
from qoqc.testing import VOCAB, tiny_model


@pytest.fixture(scope="module", params=[4, [4, 16]], ids=["kv4", "kv4 and kv16"])
def model(request: pytest.FixtureRequest, model_dir: Path) -> Any:
    torch._dynamo.reset()
    loaded = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    loaded.model.layers = loaded.model.layers[:2]
    loaded.config.num_hidden_layers = 2
    own = isinstance(request.param, list)
    more = {"kv_layers": request.param} if own else {"kv_bits": request.param}
    return qoqc.compile(loaded.eval(), glue="eager", **more)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many sequences each prefill had."""
    seen: list[int] = []
    run = slices._run

    def noted(request: Any, ids: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        seen.append(len(ids))
        return run(request, ids, kwargs)

    monkeypatch.setattr(slices, "_run", noted)
    return seen


def _batch(batch: int, length: int, padded: bool) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 500, (batch, length), generator=torch.Generator().manual_seed(batch))
    mask = torch.ones_like(ids)
    if padded:
        for row in range(0, batch, 3):
            ids[row, : row % 7 + 1], mask[row, : row % 7 + 1] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left-padded"])
@pytest.mark.parametrize(
    ("batch", "expected"),
    [(3, [3]), (8, [8]), (9, [9]), (10, [8, 2]), (21, [8, 8, 5]), (25, [8, 8, 9])],
    ids=str,
)
def test_the_same_tokens(
    model: Any,
    sizes: list[int],
    monkeypatch: pytest.MonkeyPatch,
    batch: int,
    expected: list[int],
    padded: bool,
) -> None:
    inputs = _batch(batch, 11, padded)
    options: dict[str, Any] = {
        "max_new_tokens": 6,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    whole = model.generate(**inputs, **options)
    assert sizes == [batch]
    sizes.clear()
    monkeypatch.setattr(slices, "TOKENS", 11 * 8 + 5)
    got = model.generate(**inputs, **options)
    assert sizes == expected
    assert torch.equal(got.sequences, whole.sequences)
    for own, wanted in zip(got.logits, whole.logits, strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-5)


def test_a_prompt_longer_than_a_slice_takes_few_sequences(
    model: Any, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slices, "TOKENS", 5)
    model.generate(**_batch(9, 30, False), max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert sizes == [slices.ALIGN, 9 - slices.ALIGN]


def test_chunks_along_the_prompt_are_left_to_transformers(
    model: Any, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slices, "TOKENS", 50)
    model.generate(
        **_batch(9, 30, False),
        max_new_tokens=2,
        do_sample=False,
        pad_token_id=0,
        prefill_chunk_size=16,
    )
    assert sizes == [9]


def test_slices_compile_nothing_more(sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    model = qoqc.compile(tiny_model("llama", num_hidden_layers=1), glue="eager")

    def generate(batch: int) -> None:
        ids = torch.randint(3, VOCAB, (batch, 10))
        model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)

    monkeypatch.setattr(slices, "TOKENS", 80)
    generate(3)
    generate(5)
    before = counters["stats"]["unique_graphs"]
    for batch in (16, 18, 27, 33):
        generate(batch)
        assert counters["stats"]["unique_graphs"] == before, batch
    assert sizes == [3, 5, 8, 8, 8, 8, 2, 8, 8, 8, 3, 8, 8, 8, 9]
