"""The requests of OpenAI's API that this server takes, field by field."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt

from qoqc.serve.http.errors import bad_request
from qoqc.serve.http.sampling import Sampling

MAX_STOPS = 4
"""Stop strings per request, OpenAI's limit."""

Stop = Annotated[str, Field(min_length=1)]


class StreamOptions(BaseModel):
    """The field stream_options."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False
    include_obfuscation: bool = False


class _Request(BaseModel):
    """What both kinds of requests share; None = as the model's generation config says."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    model: str
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | list[Stop] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False  # not OpenAI's: for benchmarks, as vLLM's

    def stops(self) -> tuple[str, ...]:
        """The stop strings. Raises ApiError if there are too many."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > MAX_STOPS:
            raise bad_request(f"{len(stops)} stop strings, at most {MAX_STOPS} are taken", "stop")
        return tuple(stops)

    def with_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage. Raises ApiError if it is no stream."""
        if self.stream_options is None:
            return False
        if not self.stream:
            raise bad_request("stream_options goes with stream=true", "stream_options")
        return self.stream_options.include_usage


class CompletionRequest(_Request):
    """POST /v1/completions; a prompt is a text or its token ids, one per request."""

    prompt: str | list[StrictInt] | list[str] | list[list[StrictInt]]

    def only_prompt(self) -> str | list[int]:
        """The prompt. Raises ApiError for none and for several."""
        prompt = self.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            if len(prompt) > 1:
                message = f"{len(prompt)} prompts in one request; send a request for each"
                raise bad_request(message, "prompt")
            prompt = prompt[0]
        if not prompt:
            raise bad_request("the prompt is empty", "prompt", "empty_prompt")
        return prompt  # type: ignore[return-value]  # a list that begins with an int has no others


class TextPart(BaseModel):
    """A part of a message; text is the only kind."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a chat."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def as_template_input(self) -> dict[str, str]:
        """As chat templates take it."""
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        # templates know OpenAI's newer name for the system's role only where a model does
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None

    def limit(self) -> int | None:
        """The most tokens to generate, under its new name or the old."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What the model's generation config says where a request says nothing."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int | None = None

    @classmethod
    def of(cls, generation_config: Any) -> Defaults:
        """From transformers' generation config; without do_sample it is greedy."""
        greedy = not generation_config.do_sample
        temperature, top_p = generation_config.temperature, generation_config.top_p
        return cls(
            temperature=0.0 if greedy else float(1.0 if temperature is None else temperature),
            top_p=float(1.0 if greedy or top_p is None else top_p),
            max_tokens=generation_config.max_new_tokens,
        )

    def sampling(self, request: _Request) -> Sampling:
        """How the request's tokens are chosen."""
        given: Mapping[str, float | None] = {
            "temperature": request.temperature,
            "top_p": request.top_p,
        }
        own = {name: float(value) for name, value in given.items() if value is not None}
        chosen = {"temperature": self.temperature, "top_p": self.top_p, **own}
        return Sampling(chosen["temperature"], chosen["top_p"], request.seed)
