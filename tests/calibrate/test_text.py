"""Calibration text: cut, chosen by seed, held out, and refused when there is too little."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from qoqc.calibrate.text import DEFAULT, HELD_OUT, corpus, load_text, require_vocabulary
from qoqc.errors import OptionError, Unsupported

MODEL = Path(__file__).resolve().parents[2] / "examples" / "models" / "llama-stories-4m"
SETTINGS: dict[str, Any] = {"samples": 4, "seq": 32, "seed": 0, "longest": 1024}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


def test_the_default_text_is_enough(tokenizer: Any) -> None:
    found = corpus(load_text(DEFAULT), tokenizer, samples=128, seq=None, seed=0, longest=1024)
    assert found.windows.shape[1] == 256
    assert len(found.windows) >= 6
    assert len(found.held_out.tokens) == 1


def test_no_window_is_both(tokenizer: Any) -> None:
    found = corpus(load_text(DEFAULT), tokenizer, **{**SETTINGS, "samples": 1000})
    rows = [tuple(row) for row in (*found.windows.tolist(), *found.held_out.tokens.tolist())]
    assert len(set(rows)) == len(rows)
    assert len(found.held_out.tokens) == len(rows) // 8 <= HELD_OUT


def test_the_seed_chooses(tokenizer: Any) -> None:
    text = load_text(DEFAULT)
    first, again = (corpus(text, tokenizer, **SETTINGS).windows for _ in range(2))
    assert torch.equal(first, again)
    other = corpus(text, tokenizer, **{**SETTINGS, "seed": 1}).windows
    assert other.shape == first.shape == (4, 32)
    assert not torch.equal(other, first)


def test_text_for_judging_leaves_all_for_calibration(tokenizer: Any) -> None:
    text = "A little dog and a big cat went out to play. " * 20
    found = corpus(text, tokenizer, **{**SETTINGS, "samples": 1000}, eval_text="Yes. " * 100)
    alone = corpus(text, tokenizer, **{**SETTINGS, "samples": 1000})
    assert len(found.windows) == len(alone.windows) + len(alone.held_out.tokens)
    assert found.held_out.tokens.shape[1] == 32


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"samples": 0}, OptionError, "--samples 0: expected at least 1"),
        ({"seq": 2048}, OptionError, "--seq 2048: the model takes 1024 tokens at most"),
        ({"seq": 900}, Unsupported, "less than one window of 900"),
        ({"seq": 200}, Unsupported, "one window of 200 tokens, and at least two"),
    ],
)
def test_too_little(
    tokenizer: Any, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    text = "The sun came up over the hill and the birds began to sing. " * 20
    with pytest.raises(error, match=message):
        corpus(text, tokenizer, **{**SETTINGS, **changes})


def test_short_text_without_a_length(tokenizer: Any) -> None:
    with pytest.raises(Unsupported, match="less than one window of 64; use more text"):
        corpus("Too short.", tokenizer, **{**SETTINGS, "seq": None})


def test_unreadable_text(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="cannot be read"):
        load_text(str(tmp_path / "missing.txt"))
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(Unsupported, match="is empty"):
        load_text(str(tmp_path / "empty.txt"))


def test_tokens_of_another_model() -> None:
    require_vocabulary(torch.tensor([[0, 9]]), 10, "m")
    with pytest.raises(Unsupported, match="m: its tokenizer gave token 10, its vocabulary has 10"):
        require_vocabulary(torch.tensor([[0, 10]]), 10, "m")
