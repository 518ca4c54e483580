"""From tokens to text while they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNKNOWN = "\ufffd"
"""What decoding shows for bytes that are no character, or not yet one."""


class Detokenizer:
    """The text of a growing list of tokens, in pieces.

    The pieces, joined, are what the tokenizer decodes from all tokens at once. A character whose
    bytes are spread over several tokens comes with the last of them. One exception: tokenizers with
    byte fallback give up a whole run of bytes if one of them is wrong; here the characters before
    that one stay.
    """

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer` is one of transformers'; its special tokens have no text."""
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        # the text of ids[window:] is decoded anew with each token: enough context for decoders
        # that treat a text's first token differently, and few tokens
        self._window = 0
        self._fresh = 0  # from this id on, text may still be missing in what push returned
        self._shown = ""  # the window's text that push returned

    def push(self, ids: Sequence[int]) -> str:
        """Text that is certain after `ids`; empty if they end within a character."""
        self._ids += ids
        text = self._text()
        whole = text.rstrip(UNKNOWN)
        piece = whole[len(self._shown) :]
        if piece and len(whole) == len(text):
            self._window, self._fresh = self._fresh, len(self._ids)
            self._shown = self._decode(self._window)
        else:
            self._shown += piece
        return piece

    def finish(self) -> str:
        """The rest: bytes that never became a character show as U+FFFD."""
        text = self._text()
        piece, self._shown = text[len(self._shown) :], text
        return piece

    def _text(self) -> str:
        """The window's text, of which `_shown` is the beginning."""
        text = self._decode(self._window)
        if text.startswith(self._shown):
            return text
        # the decoder takes back what was shown: go on behind it
        rest = self._decode(self._fresh)
        if not rest.rstrip(UNKNOWN):
            # perhaps only until the bytes of a character are all there: keep the window, since a
            # text of its own may lose the space that it begins with
            return self._shown + rest
        self._window, self._shown = self._fresh, ""
        return rest

    def _decode(self, start: int) -> str:
        text = self._tokenizer.decode(
            self._ids[start:], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)


class StopScanner:
    """Ends a text before the first of some strings; holds back what may be one's beginning."""

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops` are the strings, none of them empty."""
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """Text that can be shown, and whether a stop string came (then there will be no more)."""
        text = self._held + piece
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def finish(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, `stop` itself excluded."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
