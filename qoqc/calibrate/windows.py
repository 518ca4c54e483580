"""Text to judge a model on: one string, tokenized once, cut into windows that share nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import torch

from qoqc.errors import OptionError, Unsupported

Bos = Literal["tokenizer", "none", "window"]
BOS: tuple[Bos, ...] = ("tokenizer", "none", "window")


@dataclasses.dataclass(frozen=True)
class Windows:
    """Text to be judged on.

    tokens       int64 [W, seq]
    byte_counts  UTF-8 bytes of the text that each window's predicted tokens stand for; of the
                 decoded tokens where the tokenizer does not say which text that is
    bos          see cut_windows
    """

    tokens: torch.Tensor
    byte_counts: tuple[int, ...]
    bos: Bos

    @property
    def predicted(self) -> int:
        """Tokens predicted: all but the first of each window."""
        return self.tokens.shape[0] * (self.tokens.shape[1] - 1)


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file. Raises Unsupported if it cannot be read or is blank."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise Unsupported(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from (
            error
        )
    except OSError as error:
        raise Unsupported(f"{path} cannot be read: {error.strerror or error}") from error
    if not text.strip():
        raise Unsupported(f"{path} is empty; give it some text")
    return text


def cut_windows(
    text: str, tokenizer: Any, seq: int, limit: int | None = None, bos: Bos = "tokenizer"
) -> Windows:
    """The full windows of `seq` tokens in the first `limit` tokens of `text`; the rest is left out.

    bos  "tokenizer": what it puts before a text stands once, before the first window, as in the
         paper; "none": nowhere; "window": every window begins with it, followed by seq - 1 tokens
    Raises OptionError for a seq below 2, or "window" where there is no such token; Unsupported
    when the text has less than one window.
    """
    if seq < 2:
        raise OptionError(f"seq={seq}: a window needs at least 2 tokens, one to predict")
    if bos not in BOS:
        raise OptionError(f"bos={bos!r}: expected one of {', '.join(BOS)}")
    if bos == "window" and tokenizer.bos_token_id is None:
        raise OptionError("bos='window': this tokenizer has no beginning-of-sequence token")
    ids, ends = _encode(text, tokenizer, special=bos == "tokenizer")
    room = len(ids) if limit is None else min(limit, len(ids))
    # a token that every window begins with takes one place in each
    own = 1 if bos == "window" else 0
    step = seq - own
    count = min(room // seq, len(ids) // step)
    if count == 0:
        raise Unsupported(
            f"{room} tokens of text are less than one window of {seq}; use more text or a "
            "smaller seq"
        )
    tokens = torch.tensor(ids[: count * step]).view(count, step)
    if own:
        head = torch.full((count, 1), tokenizer.bos_token_id)
        tokens = torch.cat((head, tokens), dim=1)
    sizes = []
    for first in range(0, count * step, step):
        start, stop = first + 1 - own, first + step  # the predicted tokens
        if ends is None:
            piece = tokenizer.decode(ids[start:stop], skip_special_tokens=True)
        else:
            piece = text[ends[start - 1] if start else 0 : ends[stop - 1]]
        sizes.append(len(piece.encode()))
    return Windows(tokens, tuple(sizes), bos)


def _encode(text: str, tokenizer: Any, special: bool) -> tuple[list[int], list[int] | None]:
    """Token ids and the place in `text` where each ends, None if the tokenizer does not say."""
    if not getattr(tokenizer, "is_fast", False):
        return tokenizer(text, add_special_tokens=special)["input_ids"], None
    # not verbose: it would warn that the text is longer than the model's context
    encoded = tokenizer(
        text, add_special_tokens=special, return_offsets_mapping=True, verbose=False
    )
    ends: list[int] = []
    for _, end in encoded["offset_mapping"]:
        # special tokens have the empty range (0, 0): they end where the token before did
        ends.append(max(end, ends[-1] if ends else 0))
    return encoded["input_ids"], ends
