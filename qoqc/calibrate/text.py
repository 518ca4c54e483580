"""The text of a calibration: windows to calibrate on, and windows held out to judge the result."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from qoqc.calibrate.windows import Windows, cut_windows, read_text
from qoqc.errors import OptionError, Unsupported

DEFAULT = "default"
"""The name that stands for the text of the package."""

LONGEST, SHORTEST = 1024, 64
"""Tokens per window if nobody says: the paper's 1024, or what gives ENOUGH windows."""

ENOUGH = 8

HELD_OUT = 16
"""Windows held out at most; of a short text an eighth."""

EVAL_TOKENS = 20480
"""Of a text that is there for judging alone, the first tokens."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """windows: int64 [W, seq], to calibrate on; held_out: to judge on, no token in both."""

    windows: torch.Tensor
    held_out: Windows


def load_text(name: str) -> str:
    """The text of a file, or of the package's `default`. Raises Unsupported as read_text does."""
    if name == DEFAULT:
        return read_text(Path(__file__).with_name("default.txt"))
    return read_text(name)


def corpus(
    text: str,
    tokenizer: Any,
    *,
    samples: int,
    seq: int | None,
    seed: int,
    longest: int | None,
    eval_text: str | None = None,
) -> Corpus:
    """Cut `text` into windows and choose `samples` of them by `seed`; fewer if there are fewer.

    seq        tokens per window; None chooses
    longest    what the model's positions allow; None = no limit
    eval_text  is held out in place of the end of `text`
    Raises Unsupported for too little text, OptionError for samples or seq out of range.
    """
    if samples < 1:
        raise OptionError(f"--samples {samples}: expected at least 1")
    if seq is not None and longest is not None and seq > longest:
        raise OptionError(f"--seq {seq}: the model takes {longest} tokens at most")
    whole = _cut(text, tokenizer, seq, longest)
    count, seq = whole.tokens.shape
    if eval_text is None:
        out = min(HELD_OUT, max(1, count // 8))
        if count < 2:
            raise Unsupported(
                f"the calibration text has one window of {seq} tokens, and at least two are "
                "needed, one to judge the result on; use more text, a smaller --seq or --eval-text"
            )
        held_out, usable = _part(whole, count - out, count), count - out
    else:
        held_out, usable = cut_windows(eval_text, tokenizer, seq, EVAL_TOKENS), count
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(usable, generator=generator)[:samples].sort().values
    return Corpus(whole.tokens[chosen], held_out)


def require_vocabulary(windows: torch.Tensor, vocabulary: int, name: str) -> None:
    """Raise Unsupported unless every token is one of the model's."""
    top = int(windows.max())
    if top >= vocabulary:
        raise Unsupported(
            f"{name}: its tokenizer gave token {top}, its vocabulary has {vocabulary} entries; "
            "it is another model's tokenizer"
        )


def _cut(text: str, tokenizer: Any, seq: int | None, longest: int | None) -> Windows:
    if seq is not None:
        return cut_windows(text, tokenizer, seq)
    tokens = cut_windows(text, tokenizer, 2).tokens.numel()
    size = min(LONGEST, longest or LONGEST)
    while size > SHORTEST and tokens < ENOUGH * size:
        size //= 2
    return cut_windows(text, tokenizer, size)


def _part(windows: Windows, start: int, stop: int) -> Windows:
    return Windows(windows.tokens[start:stop], windows.byte_counts[start:stop], windows.bos)
