"""From a body to a request: 400 for what is no JSON, no request, or would have to be ignored."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import ValidationError

from qoqc.serve.http.errors import bad_request
from qoqc.serve.http.protocol import ChatRequest, CompletionRequest

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
}
"""Fields this server does not implement, with the values (besides null) that ask for nothing."""

BOOKKEEPING = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
)
"""Fields that are accepted and change nothing in an answer."""

Kind = TypeVar("Kind", CompletionRequest, ChatRequest)


def parse(body: bytes, kind: type[Kind]) -> Kind:
    """The request in a body. Raises ApiError 400 naming the field and what is wrong with it."""
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise bad_request(f"the body is not JSON: {error}", code="invalid_json") from error
    if not is_text(values):
        raise bad_request("a string in the body has half of a surrogate pair", code="invalid_json")
    if not isinstance(values, dict):
        raise bad_request("the body is not a JSON object", code="invalid_json")
    for name, neutral in NEUTRAL.items():
        given = values.pop(name, None)
        # 1 == True, which is no number of answers
        same = any(
            given == value and isinstance(given, bool) == isinstance(value, bool)
            for value in neutral
        )
        if given is not None and not same:
            takes = "" if not neutral else f"; it may be {json.dumps(neutral[0])}, or left out"
            raise bad_request(
                f"{name} is not supported by this server{takes}", name, "unsupported_parameter"
            )
    for name in BOOKKEEPING:
        values.pop(name, None)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise bad_request(*_described(error)) from error


def is_text(values: Any) -> bool:
    """Whether all strings in a JSON value can be encoded: tokenizers take no lone surrogates."""
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _described(error: ValidationError) -> tuple[str, str]:
    """(message, field) of the first complaint."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))
    field = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        return f"{where} is not a parameter this server knows", field
    return f"{where}: {first['msg']}", field
