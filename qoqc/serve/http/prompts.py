"""From a request to a job: its prompt as tokens, and how many tokens may follow it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jinja2

from qoqc.serve.http.driver import Job
from qoqc.serve.http.errors import ApiError, bad_request
from qoqc.serve.http.protocol import ChatRequest, CompletionRequest, Defaults

COMPLETION_TOKENS = 16
"""Tokens of a completion that names no max_tokens: OpenAI's default."""


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Limits of the model and the server, in tokens.

    vocabulary  token ids are below it
    context     most tokens of prompt and answer together: the model's, or what the cache holds
    max_tokens  most tokens of an answer; None = what the context leaves
    """

    vocabulary: int
    context: int
    max_tokens: int | None


def completion_job(
    request: CompletionRequest, tokenizer: Any, defaults: Defaults, bounds: Bounds
) -> Job:
    """The job of POST /v1/completions. Raises ApiError. Not for the event loop: it tokenizes."""
    prompt = request.only_prompt()
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt)["input_ids"])
    else:
        wrong = next((token for token in prompt if not 0 <= token < bounds.vocabulary), None)
        if wrong is not None:
            raise bad_request(f"token id {wrong} is not below {bounds.vocabulary}", "prompt")
        ids = prompt
    return _job(request, ids, request.max_tokens, COMPLETION_TOKENS, defaults, bounds)


def chat_job(request: ChatRequest, tokenizer: Any, defaults: Defaults, bounds: Bounds) -> Job:
    """The job of POST /v1/chat/completions. Raises ApiError. Not for the event loop."""
    if not request.messages:
        raise bad_request("there are no messages", "messages", "empty_prompt")
    if tokenizer.chat_template is None:
        raise bad_request("the model has no chat template; use /v1/completions", "messages")
    messages = [message.as_template_input() for message in request.messages]
    try:
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True
        )
    except jinja2.TemplateError as error:
        # templates refuse roles and orders that the model was not trained on
        raise bad_request(f"the model's chat template: {error}", "messages") from error
    ids = list(encoded["input_ids"])
    return _job(request, ids, request.limit(), defaults.max_tokens, defaults, bounds)


def _job(
    request: CompletionRequest | ChatRequest,
    prompt: list[int],
    asked: int | None,
    default: int | None,
    defaults: Defaults,
    bounds: Bounds,
) -> Job:
    if not prompt:
        raise bad_request("the prompt has no tokens", code="empty_prompt")
    room = bounds.context - len(prompt)
    if room < 1:
        raise _too_long(f"the prompt has {len(prompt)} tokens", bounds)
    most = room if bounds.max_tokens is None else min(room, bounds.max_tokens)
    if asked is None:
        asked = most if default is None else min(default, most)
    if bounds.max_tokens is not None and asked > bounds.max_tokens:
        message = f"max_tokens {asked}: this server generates at most {bounds.max_tokens}"
        raise bad_request(message, "max_tokens")
    if asked > room:
        raise _too_long(f"the prompt has {len(prompt)} tokens and max_tokens is {asked}", bounds)
    return Job(
        prompt,
        asked,
        defaults.sampling(request),
        stop=request.stops(),
        ignore_eos=request.ignore_eos,
        stream=bool(request.stream),
    )


def _too_long(what: str, bounds: Bounds) -> ApiError:
    message = f"{what}: this server takes {bounds.context} tokens, prompt and answer together"
    return bad_request(message, code="context_length_exceeded")
