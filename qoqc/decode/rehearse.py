"""A decode step as a model's own code prepares it, asked for without running the model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from transformers.masking_utils import create_masks_for_generate

from qoqc.decode.request import TOKEN_TYPES, Request

MASKS = "create_masks_for_generate"
"""The method by which some models make masks; for others it is transformers' function so called."""


class Unlike(Exception):
    """A step needs something that the decode loop does not give it; says what."""


def rehearse(
    request: Request, padded: bool, length: int
) -> tuple[torch.Tensor | None, dict[str, Any], list[torch.Tensor]]:
    """The step for the last of `length` tokens: its position, plain arguments, and conditions.

    padded  the request's mask hides tokens; else it is left out

    The position is int64 [batch or 1, 1], or None where the forward takes none. The conditions,
    bools without axes, must be True for the step to be what a forward makes of that, the token and
    the mask of all tokens by itself. Raises Unlike if the step is given more.
    """
    model, ids = request.model, request.input_ids
    new = length - ids.shape[1]
    given = request.kwargs.get("attention_mask")
    held = (ids if given is None else given).shape[1] + new - 1
    cache = request.cache.holding(held, model.device)
    ids = F.pad(ids, (0, new))
    kwargs = {
        **request.kwargs,
        "attention_mask": given if padded else None,
        "past_key_values": cache,
    }
    try:
        kwargs = model._update_model_kwargs_for_generation({}, kwargs, num_new_tokens=new)
        made = model.prepare_inputs_for_generation(ids, next_sequence_length=1, **kwargs)
    except Exception as error:  # any: the code is the model's
        raise Unlike(f"asked for it, it raises {error!r}") from error
    if made.pop("past_key_values", None) is not cache or not made.pop("use_cache", True):
        raise Unlike("the cache is not used")
    tokens, position = made.pop("input_ids", None), made.pop("position_ids", None)
    if not isinstance(tokens, torch.Tensor) or tokens.shape != ids[:, -1:].shape:
        raise Unlike("it gets more than the newest token")
    if position is not None and position.dim() != 2:
        raise Unlike("a token has more than one position")
    conditions = [(tokens == ids[:, -1:]).all()]
    conditions += _masks_agree(request, made.pop("attention_mask", None), kwargs)
    return position, _plain(made, _types_of_masks(model)), conditions


def _types_of_masks(model: Any) -> frozenset[str]:
    """The kinds of tokens that a model makes its masks from: agreeing ones need none."""
    own = getattr(model, MASKS, None)
    return frozenset() if own is None else TOKEN_TYPES & inspect.signature(own).parameters.keys()


def _plain(arguments: Mapping[str, Any], unneeded: frozenset[str]) -> dict[str, Any]:
    """The arguments that are given; raises Unlike if one is a tensor or something made of them."""
    given = {k: v for k, v in arguments.items() if v is not None and k not in unneeded}
    others = [k for k, v in given.items() if not isinstance(v, (bool, int, float, str))]
    if others:
        raise Unlike(f"an argument that changes from step to step: {', '.join(others)}")
    return given


def _masks_agree(request: Request, made: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Conditions under which the mask `made` for a step is that of transformers' function."""
    mask = kwargs["attention_mask"]
    if isinstance(made, torch.Tensor) and made.dim() == 2 and mask is not None:
        # what it says of tokens that are still to come, causality hides
        return [(made[:, : mask.shape[1]] == mask).all()]
    if made is None and mask is None:
        return []
    model, ids = request.model, request.input_ids
    plain = create_masks_for_generate(
        config=model.config,
        inputs_embeds=torch.empty(len(ids), 1, 0, dtype=model.dtype, device=ids.device),
        attention_mask=mask,
        past_key_values=kwargs["past_key_values"],
        position_ids=kwargs.get("position_ids"),
    )
    ours, theirs = _by_layer(plain), _by_layer(made)
    shapes = ({k: v.shape for k, v in masks.items()} for masks in (ours, theirs))
    if next(shapes) != next(shapes):
        raise Unlike("its masks are of other kinds than transformers'")
    return [(ours[kind] == theirs[kind]).all() for kind in ours]


def _by_layer(mask: Any) -> dict[str, Any]:
    """The masks there are, by the kind of layer they are for."""
    masks = mask if isinstance(mask, dict) else {"": mask}
    return {kind: each for kind, each in masks.items() if each is not None}
