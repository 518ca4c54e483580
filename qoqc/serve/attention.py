"""The attention of a served model: one op per layer, for whatever requests a step has.

A step's tokens come as one row, [1, H, T, D], request after request. Which belong together, and
where their pages are, the engine knows; it is the same for all layers and changes with every step,
so the op finds it in the step that runs, and graphs are compiled once for all steps.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface

from qoqc.errors import Unsupported
from qoqc.ir.spec import KVSpec
from qoqc.log import get_logger

NAME = "qoqc_paged"

log = get_logger("serve")


class Step(Protocol):
    """What the requests of one forward need of a layer's attention."""

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        softcap: float,
        window: int,
        sinks: Tensor | None,
    ) -> Tensor:
        """Store k [1, H, T, Dk] and v [1, H, T, Dv] in the layer's pages, attend to those.

        q       [1, Hq, T, Dk]; the tokens of a request see those before them and themselves
        window  if not 0, only the last `window` of these
        softcap, sinks [Hq]  as in kv4_attention (ir/ops.py)

        Returns [1, T, Hq, Dv], zeros for tokens that only fill up the batch.
        """
        ...


class _Running(threading.local):
    step: Step | None = None


_RUNNING = _Running()


@contextlib.contextmanager
def running(step: Step) -> Iterator[None]:
    """Forwards of this thread, inside the block, are for `step`."""
    outer, _RUNNING.step = _RUNNING.step, step
    try:
        yield
    finally:
        _RUNNING.step = outer


torch.library.define(
    "qoqc::paged_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? sinks, int layer, float scale, float softcap, "
    "int window) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
paged_attention = torch.ops.qoqc.paged_attention.default


@torch.library.impl("qoqc::paged_attention", "default")
def _paged_attention_impl(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    layer: int,
    scale: float,
    softcap: float,
    window: int,
) -> Tensor:
    step = _RUNNING.step
    if step is None:
        raise Unsupported(
            "this model serves requests, and its attention has no cache outside of the engine; "
            "stop the engine to call the model or its generate() yourself"
        )
    return step.attend(
        layer, q, k, v, scale=scale, softcap=softcap, window=window, sinks=sinks
    )  # fmt: skip


@torch.library.register_fake("qoqc::paged_attention")  # type: ignore[untyped-decorator]
def _paged_attention_fake(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> Tensor:
    return q.new_empty((1, q.shape[2], q.shape[1], v.shape[3]))


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
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function as transformers calls them: query [1, Hq, T, D] -> [1, T, Hq, D].

    Raises Unsupported for dropout, masks and a position bias: which token sees which is known
    from the requests alone.
    """
    if dropout or attention_mask is not None or kwargs.get("position_bias") is not None:
        raise Unsupported(
            "attention with dropout, a mask or a position bias cannot run over pages; "
            "call model.eval(), and serve decoders whose tokens see all before them"
        )
    scale = float(query.shape[-1]) ** -0.5 if scaling is None else scaling
    layer: Any = module.layer_idx
    out = paged_attention(
        query, key, value, s_aux, layer, scale, softcap or 0.0, sliding_window or 0
    )
    return out, None


class _Probe:
    """A step that stores nothing and remembers what every layer would store."""

    def __init__(self) -> None:
        self.specs: dict[int, KVSpec] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
        """Zeros, as attention.Step's."""
        self.specs[layer] = KVSpec(k.shape[1], k.shape[3], v.shape[3])
        return q.new_zeros(1, q.shape[2], q.shape[1], v.shape[3])


def probe(model: Any) -> list[KVSpec]:
    """KV heads and head sizes of every layer, as its attention gets them; bits are left at 4.

    Runs one token through the uncompiled model, which keeps its own attention. Raises Unsupported
    as `adopt`, and for models with layers that have no attention over keys and values.
    """
    config = model.config.get_text_config(decoder=True)
    found = _Probe()
    had = adopt(model)
    try:
        token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        with torch.no_grad(), running(found):
            model.forward(input_ids=token, position_ids=token, use_cache=False)
    finally:
        model.set_attn_implementation(had)
    without = set(range(config.num_hidden_layers)) - set(found.specs)
    if without:
        raise Unsupported(
            f"layer {min(without)} of {type(model).__name__} keeps no keys and values that pages "
            "could hold; it runs by model.generate() only"
        )
    return [found.specs[layer] for layer in range(config.num_hidden_layers)]


def adopt(model: Any) -> str:
    """Give `model` this attention; the name of the one it had.

    Raises Unsupported for models whose attention transformers cannot replace, and for attention
    to anything but all tokens before, or a window of them.
    """
    config = model.config.get_text_config(decoder=True)
    kind = type(model).__name__
    if not model._supports_attention_backend:
        raise Unsupported(
            f"{kind} has its own attention, which transformers cannot replace; "
            "it runs by model.generate() only"
        )
    unknown = set(getattr(config, "layer_types", None) or ()) - {
        "full_attention", "sliding_attention",
    }  # fmt: skip
    if unknown:
        raise Unsupported(
            f"{kind} has layers of {', '.join(sorted(unknown))}, which have no pages of keys and "
            "values; it runs by model.generate() only"
        )
    had: str = config._attn_implementation
    AttentionInterface.register(NAME, attend)
    model.set_attn_implementation(NAME)
    log.info("attention of %s: %s instead of %s", kind, NAME, had)
    return had
