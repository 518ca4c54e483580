"""What decode steps give to the forward; where a model's own code decides, it is asked before."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import torch
from transformers import GenerationMixin

from qoqc.decode.rehearse import MASKS, Unlike, rehearse
from qoqc.decode.request import Request

STEP = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
"""Methods of GenerationMixin that say what the next step gets; some models have their own."""

_ALIKE: weakref.WeakKeyDictionary[Any, set[Hashable]] = weakref.WeakKeyDictionary()
"""Of each model, kinds of steps of text and lengths at which they were found to be like others."""


@dataclasses.dataclass(frozen=True)
class StepInputs:
    """What the decode steps of a generation give to the forward, besides tokens and the cache.

    padded     a mask of the tokens, since prompts have padding
    position   int64 [batch or 1, 1] of the first step, one more in each; None: it takes none
    arguments  further ones, plain values
    """

    padded: bool
    position: torch.Tensor | None
    arguments: dict[str, Any]


def step_inputs(request: Request) -> StepInputs | str:
    """The inputs of all decode steps of a request, or why they are not as the loop makes them.

    Where only transformers' code is concerned it is known what they are. A model's own code is
    asked: about the first two steps, the last, and those around each length that the model's
    config names (Phi-3 computes its cache anew at one). Its masks must be those of transformers'
    function: then its forward makes them by itself from a mask of the tokens, within the graph.
    """
    kind, kwargs = type(request.model), request.kwargs
    mask, position = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is not None and mask.dim() != 2:
        return "the mask given is not one of tokens"
    padded = mask is not None and not bool(mask.all())
    own = any(getattr(kind, name) is not getattr(GenerationMixin, name) for name in STEP)
    if own or hasattr(kind, MASKS) or request.others:
        try:
            return _asked(request, padded)
        except Unlike as difference:
            return f"{kind.__name__} prepares the inputs of a step by itself: {difference}"
    if not isinstance(position, torch.Tensor) or position.dim() != 2:
        return f"{kind.__name__} takes no position of each token"
    one = kwargs.get("logits_to_keep") == 1
    return StepInputs(padded, position[:, -1:] + 1, {"logits_to_keep": 1} if one else {})


def _asked(request: Request, padded: bool) -> StepInputs:
    """As the model's code says wherever it may say something new; raises Unlike if it differs."""
    lengths = _lengths(request)
    first, arguments, conditions = rehearse(request, padded, lengths[0])
    known = _ALIKE.setdefault(request.model, set())
    asked = {length: (length, padded, *sorted(arguments.items())) for length in lengths[1:]}
    if request.others:  # they may decide
        known = set()
    for length in [length for length, kind in asked.items() if kind not in known]:
        position, others, more = rehearse(request, padded, length)
        if others != arguments or (position is None) != (first is None):
            raise Unlike(f"other arguments at {length} tokens than at {lengths[0]}")
        if position is not None and first is not None:
            conditions.append((position - first == length - lengths[0]).all())
        conditions += more
    if not torch.stack(conditions).all():
        raise Unlike("masks that are not transformers', or positions that are not counted")
    known.update(asked.values())
    return StepInputs(padded, first, arguments)


def _lengths(request: Request) -> list[int]:
    """How many tokens there are in the steps to ask about, the one of the step included."""
    first = request.input_ids.shape[1] + 1
    last = max(first, (request.max_length or first + 2) - 1)
    named = {n + more for n in _integers(request.model.config.to_dict()) for more in (0, 1, 2)}
    return sorted({first, min(first + 1, last), last} | {n for n in named if first < n < last})


def _integers(value: Any) -> Iterator[int]:
    """Those in a config, at any depth."""
    if isinstance(value, int) and not isinstance(value, bool):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _integers(each)
