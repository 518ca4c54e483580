"""Windows of a text: which tokens, which bytes, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from qoqc.calibrate.windows import cut_windows, read_text
from qoqc.errors import OptionError, Unsupported

MODEL = Path(__file__).resolve().parents[2] / "examples" / "models" / "llama-stories-4m"
TEXT = (
    "Once upon a time, there was a little girl called Zo\u00eb. She had a caf\u00e9 \u2014 and a "
    'naughty \U0001f436 dog! "Come here," she said. The dog ran to the park and played all day.\n\n'
) * 3


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


def test_windows_are_the_first_full_ones_of_the_text_tokenized_once(tokenizer: Any) -> None:
    ids = tokenizer(TEXT)["input_ids"]
    windows = cut_windows(TEXT, tokenizer, 16)
    assert windows.tokens.shape == (len(ids) // 16, 16)
    assert windows.tokens.flatten().tolist() == ids[: len(ids) // 16 * 16]
    assert windows.tokens[0, 0] == tokenizer.bos_token_id
    assert windows.tokens[1, 0] != tokenizer.bos_token_id
    assert cut_windows(TEXT, tokenizer, 16, 50).tokens.shape == (3, 16)
    assert windows.predicted == windows.tokens.shape[0] * 15


def test_no_bos_and_one_in_every_window(tokenizer: Any) -> None:
    bare = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    none = cut_windows(TEXT, tokenizer, 16, bos="none")
    assert none.tokens.flatten().tolist() == bare[: none.tokens.numel()]
    every = cut_windows(TEXT, tokenizer, 16, bos="window")
    assert set(every.tokens[:, 0].tolist()) == {tokenizer.bos_token_id}
    inner = every.tokens[:, 1:].flatten().tolist()
    assert inner == bare[: len(inner)]
    assert len(cut_windows(TEXT, tokenizer, 16, 50, bos="window").tokens) == 3


@pytest.mark.parametrize("bos", ["tokenizer", "none", "window"])
@pytest.mark.parametrize("seq", [2, 7, 30])
def test_bytes_are_those_of_the_predicted_tokens(tokenizer: Any, bos: Any, seq: int) -> None:
    windows = cut_windows(TEXT, tokenizer, seq, bos=bos)
    assert len(windows.byte_counts) == len(windows.tokens)
    if bos == "window":  # nothing is only read: the sum is a prefix of the text
        used = tokenizer.decode(windows.tokens[:, 1:].flatten(), skip_special_tokens=True)
        # a cut may fall within a character's bytes, which then count in one place
        assert abs(sum(windows.byte_counts) - len(used.encode())) <= 4
    one = cut_windows(TEXT, tokenizer, 60, bos=bos)
    ids = one.tokens[0, 1:]
    assert abs(one.byte_counts[0] - len(tokenizer.decode(ids).encode())) <= 4


def test_a_tokenizer_without_offsets_counts_decoded_bytes(tokenizer: Any) -> None:
    class Slow:
        is_fast = False
        bos_token_id = tokenizer.bos_token_id

        def __call__(self, text: str, add_special_tokens: bool) -> Any:
            return {"input_ids": tokenizer(text, add_special_tokens=add_special_tokens).input_ids}

        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            found: str = tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
            return found

    plain = TEXT.encode("ascii", "ignore").decode()
    slow, fast = cut_windows(plain, Slow(), 20), cut_windows(plain, tokenizer, 20)
    assert torch.equal(slow.tokens, fast.tokens)
    # a decoded piece may lose the blank it begins with
    for a, b in zip(slow.byte_counts, fast.byte_counts, strict=True):
        assert abs(a - b) <= 1


def test_too_little_text_and_bad_settings(tokenizer: Any) -> None:
    with pytest.raises(Unsupported, match="less than one window of 4096"):
        cut_windows(TEXT, tokenizer, 4096)
    with pytest.raises(Unsupported, match="10 tokens of text are less than one window of 16"):
        cut_windows(TEXT, tokenizer, 16, 10)
    with pytest.raises(OptionError, match="seq=1"):
        cut_windows(TEXT, tokenizer, 1)
    with pytest.raises(OptionError, match="bos='twice'"):
        cut_windows(TEXT, tokenizer, 16, bos="twice")
    nameless = SimpleNamespace(bos_token_id=None)
    with pytest.raises(OptionError, match="no beginning-of-sequence token"):
        cut_windows(TEXT, nameless, 16, bos="window")


def test_reading_text(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_text(TEXT, encoding="utf-8")
    assert read_text(file) == TEXT
    file.write_text(" \n\t")
    with pytest.raises(Unsupported, match="is empty"):
        read_text(file)
    file.write_bytes(b"caf\xe9 au lait")
    with pytest.raises(Unsupported, match="not UTF-8 text: .* at byte 3"):
        read_text(file)
    with pytest.raises(Unsupported, match="cannot be read: No such file"):
        read_text(tmp_path / "missing")
    with pytest.raises(Unsupported, match="cannot be read: Is a directory"):
        read_text(tmp_path)
