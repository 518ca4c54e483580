"""`qoqc chat`: a conversation with a compiled model, tokens shown as they come."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

import qoqc.generate
from qoqc.artifact.manifest import is_artifact
from qoqc.cli.progress import console, waiting
from qoqc.cli.source import (
    changed_options,
    choose_device,
    load_config,
    load_model,
    load_tokenizer,
    prepare,
)
from qoqc.errors import Unsupported

GREETING = "/reset forgets the conversation, /exit leaves, Ctrl-C stops an answer"


@dataclasses.dataclass(frozen=True)
class Settings:
    """How answers are generated; None leaves a choice to the model's generation config."""

    max_new_tokens: int
    temperature: float | None
    seed: int | None

    def generate_options(self) -> dict[str, Any]:
        """The keyword arguments of model.generate."""
        if self.temperature is None:
            return {}
        if self.temperature == 0:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature}


def run(
    model_name: str,
    prompt: str | None,
    settings: Settings,
    *,
    device: str,
    glue: str,
    require_cached: bool = False,
) -> None:
    """Answer `prompt`, or hold a conversation until /exit or Ctrl-D.

    Raises NotCached if something must be compiled although `require_cached` is set.
    """
    where = choose_device(device)
    options = changed_options(glue, require_cached=require_cached)
    prepare()
    chat = Chat(*_load(model_name, where, options), settings)
    if prompt is not None:
        chat.answer(prompt)
    elif sys.stdin.isatty():
        console.print(GREETING, style="dim")
        _converse(chat, lambda: input("> "))
    else:
        _converse(chat, input)


def _load(model_name: str, device: torch.device, options: dict[str, Any]) -> tuple[Any, Any]:
    """The compiled model and its tokenizer."""
    with waiting(f"Loading {model_name}"):
        load_config(model_name)
        tokenizer = load_tokenizer(model_name)
        if tokenizer is None:
            raise Unsupported(f"{model_name} has no tokenizer, and a chat needs one")
        if is_artifact(Path(model_name)):
            return qoqc.generate.load(model_name, device, **options), tokenizer
        return qoqc.generate.compile(load_model(model_name, device), **options), tokenizer


def _converse(chat: Chat, read: Callable[[], str]) -> None:
    """Read, answer, repeat. Ctrl-C stops an answer; at the prompt it leaves, as Ctrl-D does."""
    while True:
        try:
            line = read().strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line == "/exit":
            return
        if line == "/reset":
            chat.reset()
        elif line:
            try:
                chat.answer(line)
            except Unsupported as error:
                console.print(str(error), style="yellow")
            except KeyboardInterrupt:
                print()


class Chat:
    """A conversation: its history, and the model that continues it."""

    def __init__(self, model: Any, tokenizer: Any, settings: Settings) -> None:
        """A conversation with `model`, compiled already."""
        self._model = model
        self._tokenizer = tokenizer
        self._settings = settings
        self._history: list[dict[str, str]] = []
        if settings.seed is not None:
            torch.manual_seed(settings.seed)

    def reset(self) -> None:
        """Forget the conversation."""
        self._history.clear()

    def answer(self, text: str) -> str:
        """Print the answer to `text` as it is generated; an answer that is stopped is forgotten.

        Raises Unsupported when the conversation has outgrown the model's context.
        """
        question = {"role": "user", "content": text}
        inputs = self._encode([*self._history, question])
        length = inputs["input_ids"].shape[1]
        room = self._room(length)
        with waiting("Compiling and reading the prompt") as stop_waiting:
            stream = _Stream(self._tokenizer, stop_waiting)
            with torch.no_grad():
                output = self._model.generate(
                    **inputs,
                    max_new_tokens=min(room, self._settings.max_new_tokens),
                    streamer=stream,
                    **self._settings.generate_options(),
                )
        answer = self._tokenizer.decode(output[0, length:], skip_special_tokens=True)
        self._history += [question, {"role": "assistant", "content": answer}]
        console.print(stream.speed(), style="dim")
        return str(answer)

    def _encode(self, messages: list[dict[str, str]]) -> Any:
        """Token ids: through the chat template if there is one, else the last text as it is."""
        if self._tokenizer.chat_template is not None:
            encoded = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            encoded = self._tokenizer(
                "".join(message["content"] for message in messages), return_tensors="pt"
            )
        names = ("input_ids", "attention_mask")
        return {name: encoded[name].to(self._model.device) for name in names}

    def _room(self, length: int) -> int:
        config = self._model.config.get_text_config(decoder=True)
        limit = getattr(config, "max_position_embeddings", None)
        if limit is None:
            return self._settings.max_new_tokens
        if length >= limit:
            raise Unsupported(
                f"the conversation has {length} tokens, the model's context {limit}; /reset it"
            )
        return int(limit) - length


class _Stream(TextStreamer):
    """Prints text as it is finished and times the tokens; ends the waiting display at the first."""

    def __init__(self, tokenizer: Any, on_first: Callable[[], None]) -> None:
        """`on_first` is called before the first token is shown."""
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_first = on_first
        self._times = [time.perf_counter()]

    def put(self, value: torch.Tensor) -> None:
        """See TextStreamer; the first call brings the prompt, the others a token each."""
        if not self.next_tokens_are_prompt:
            if len(self._times) == 1:
                self._on_first()
            self._times.append(time.perf_counter())
        super().put(value)

    def speed(self) -> str:
        """`200 tokens, 41.0 tok/s, first after 0.3 s`.

        The rate counts from the second token on: before it, both graphs may have been compiled.
        """
        tokens = len(self._times) - 1
        first = self._times[1] - self._times[0] if tokens else 0.0
        seconds = self._times[-1] - self._times[2] if tokens > 2 else 0.0
        rate = f"{(tokens - 2) / seconds:.1f} tok/s, " if seconds > 0 else ""
        return f"{tokens} tokens, {rate}first after {first:.1f} s"
