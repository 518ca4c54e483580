"""generate() with windows as arguments, token for token what masks give."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import qoqc
from qoqc import pipeline
from qoqc.passes import manager
from qoqc.testing import tiny_model

FAMILIES = ("gpt_oss", "gemma2", "gemma3_text", "starcoder2")


def generated(family: str, hidden: int) -> Any:
    """Tokens and logits behind prompts across two pages; the second prompt begins with padding."""
    torch._dynamo.reset()
    pipeline.reports.clear()
    model = qoqc.compile(tiny_model(family, sliding_window=66), glue="eager")
    ids = torch.randint(3, 384, (2, 100), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, :hidden] = 0
    return model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=40,
        min_new_tokens=40,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )


@pytest.mark.parametrize("hidden", [0, 50])
@pytest.mark.parametrize(
    "family", ["mistral", *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES)]
)
def test_generate(family: str, hidden: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = generated(family, hidden)
    assert pipeline.reports[-1].counts["windows"] == 2
    without = tuple(each for each in manager.PIPELINE if each.__name__ != "windows")
    monkeypatch.setattr(manager, "PIPELINE", without)
    wanted = generated(family, hidden)
    assert "windows" not in pipeline.reports[-1].counts
    assert torch.equal(found.sequences, wanted.sequences)
    assert torch.equal(torch.stack(found.logits), torch.stack(wanted.logits))
