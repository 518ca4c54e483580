"""The attention "qoqc" of transformers: what its SDPA does not have, in one op.

Soft-capped scores (Gemma 2) and attention sinks (gpt-oss) run eager in transformers, since SDPA has
neither. As one op they are found in a graph, and fuse with the cache in front of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from qoqc.errors import Unsupported
from qoqc.ir import ops
from qoqc.log import get_logger

NAME = "qoqc"

log = get_logger("runtime")


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function as transformers calls them: query [B, Hq, S, D] -> [B, S, Hq, D].

    softcap         draws scores into -softcap .. softcap
    s_aux           [Hq] sinks
    attention_mask  bool or added to the scores; without one, causal as the module says

    A sliding window is in the mask. Raises Unsupported for dropout and for a position bias, which
    no model with a soft cap or sinks has.
    """
    if dropout or kwargs.get("position_bias") is not None:
        extra = "dropout" if dropout else "a position bias"
        raise Unsupported(
            f"attention with {extra} cannot run as {NAME!r}; "
            'use model.set_attn_implementation("eager"), and model.eval() for inference'
        )
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    causal = is_causal and attention_mask is None and query.shape[2] > 1
    scale = float(query.shape[-1]) ** -0.5 if scaling is None else scaling
    out = ops.attention(query, key, value, attention_mask, s_aux, scale, softcap or 0.0, causal)
    return out.transpose(1, 2).contiguous(), None


def adopt(model: Any) -> bool:
    """Give `model` this attention if its own has a soft cap or sinks; returns whether it was done.

    Told by the config and by parameters called `sinks`. Only what transformers chose by itself is
    replaced: eager, or the SDPA of releases before 5.23, which drops a soft cap without a word.
    """
    config = model.config.get_text_config(decoder=True)
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    sinks = any(name.rpartition(".")[2] == "sinks" for name, _ in model.named_parameters())
    chosen = config._attn_implementation
    if not (capped or sinks) or chosen not in ("eager", "sdpa"):
        return False
    if not model._supports_attention_backend:
        return False
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    log.info("attention of %s: %s instead of %s", type(model).__name__, NAME, chosen)
    return True


@contextlib.contextmanager
def adopted(model: Any) -> Iterator[None]:
    """`adopt` for as long as it lasts; the model has the attention it had afterwards."""
    chosen = model.config.get_text_config(decoder=True)._attn_implementation
    if not adopt(model):
        yield
        return
    try:
        yield
    finally:
        model.set_attn_implementation(chosen)
