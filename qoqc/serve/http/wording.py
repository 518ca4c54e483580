"""The JSON of answers: completions and chats, whole or as chunks of a stream."""

from __future__ import annotations

import json
import secrets
import time
from typing import Any

DONE = b"data: [DONE]\n\n"


def event(value: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def usage(prompt: int, generated: int) -> dict[str, int]:
    """Tokens of a request."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
    }


class Wording:
    """How one answer of /v1/completions is put."""

    prefix = "cmpl"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, model: str, with_usage: bool) -> None:
        """with_usage: chunks have the field usage, and a last one has the figures."""
        self._with_usage = with_usage
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, text: str, reason: str, tokens: dict[str, int]) -> dict[str, Any]:
        """The answer in one piece."""
        choice = {"index": 0, "finish_reason": reason, "logprobs": None, **self.said(text)}
        return {**self._head, "object": self.whole_object, "choices": [choice], "usage": tokens}

    def opening(self) -> bytes:
        """What a stream begins with."""
        return b""

    def piece(self, text: str, reason: str | None) -> bytes:
        """A chunk with more text; the last one names the reason why it ends."""
        choice = {"index": 0, "finish_reason": reason, "logprobs": None, **self.added(text)}
        return self._chunk([choice], None)

    def closing(self, tokens: dict[str, int]) -> bytes:
        """What a stream ends with."""
        return (self._chunk([], tokens) if self._with_usage else b"") + DONE

    def said(self, text: str) -> dict[str, Any]:
        """The part of a choice that holds a whole answer's text."""
        return {"text": text}

    def added(self, text: str) -> dict[str, Any]:
        """The part of a choice that holds a piece of it."""
        return {"text": text}

    def _chunk(self, choices: list[dict[str, Any]], tokens: dict[str, int] | None) -> bytes:
        figures = {"usage": tokens} if self._with_usage else {}
        return event({**self._head, "object": self.chunk_object, "choices": choices, **figures})


class ChatWording(Wording):
    """How one answer of /v1/chat/completions is put."""

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self) -> bytes:
        """The chunk that names the role."""
        delta = {"role": "assistant", "content": ""}
        choice = {"index": 0, "finish_reason": None, "logprobs": None, "delta": delta}
        return self._chunk([choice], None)

    def said(self, text: str) -> dict[str, Any]:
        """A message."""
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def added(self, text: str) -> dict[str, Any]:
        """A difference to the message so far; empty with the reason."""
        return {"delta": {"content": text} if text else {}}
