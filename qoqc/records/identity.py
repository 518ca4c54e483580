"""What a model and a call are, as far as a traced graph may depend on it: equal parts, equal graph.

Dynamo guards the same things one by one; here they are compared as a whole, and anything that is
not known to be harmless makes another identity or none.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import FunctionType, MethodType
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qoqc.records.functions import bodies
from qoqc.runtime.dynamo import dispatch_keys, undisturbed
from qoqc.runtime.kv_cache import KV4Cache
from qoqc.runtime.kv_layers import KV4Layer

Identity = tuple[Any, ...]

PLAIN = (int, float, bool, str, type(None), torch.dtype)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
NAMES = frozenset({"name_or_path", "_name_or_path", "generation_config", "_original_object_hash"})
"""Where a model came from, and what only generate() reads: no graph depends on it."""

OWN = frozenset(vars(torch.nn.Module()).keys() | {"_compiled_call_impl"})
"""What torch keeps in every module: looked at by itself, or hooks, or of state_dict only."""
LAYER = ("bits", "prefill_kv", "empty")
POOLS = ("k_pages", "v_pages", "kv_words", "block_table", "length")
MOVING_ROPE = frozenset({"dynamic", "longrope"})
"""Rotary embeddings that write their frequencies while the model runs."""


def of_model(model: torch.nn.Module) -> Identity | None:
    """The structure of a model: classes, plain attributes, config, tensors' kinds and sharing.

    None if there are hooks, a forward of an instance's own, or a module that trains.
    """
    parts: list[Any] = [_attention(model)]
    seen: dict[int, int] = {}
    kinds: dict[type[torch.nn.Module], Identity] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        held = module.__dict__
        if module.training or "forward" in held or any(held[hooks] for hooks in HOOKS):
            return None
        first = seen.setdefault(id(module), len(seen))
        attributes = {k: v for k, v in held.items() if k not in OWN}
        kind = type(module)
        if kind not in kinds:
            kinds[kind] = (kind.__module__, kind.__qualname__, bodies(kind.forward))
        parts.append((name, first, kinds[kind], _plain(attributes, seen)))
        for held_tensors in (held["_parameters"], held["_buffers"]):
            for leaf, tensor in held_tensors.items():
                if tensor is not None:
                    first = seen.setdefault(id(tensor), len(seen))
                    parts.append((leaf, first, tuple(tensor.shape), *_kind(tensor)))
    return tuple(parts)


def of_call(model: torch.nn.Module, kwargs: Mapping[str, Any]) -> Identity | None:
    """The kinds of a call's arguments and torch's state; None for a call that is not recorded.

    Recorded are calls with tokens, positions and a quantized cache, without a mask, under no_grad.
    """
    cache = kwargs.get("past_key_values")
    if type(cache) is not KV4Cache or kwargs.get("logits_to_keep", 0) not in (0, 1):
        return None
    state = undisturbed()
    if state is None or _moving(model):
        return None
    parts: list[Any] = [state]
    for name, value in sorted(kwargs.items()):
        if name == "past_key_values":
            continue
        if isinstance(value, torch.Tensor):
            if name not in ("input_ids", "position_ids") or value.dim() != 2:
                return None
            parts.append((name, *_kind(value), _ones(value)))
        elif value is None or type(value) in (bool, int):
            parts.append((name, repr(value)))
        else:
            return None
    for layer in cache.layers:
        if type(layer) is not KV4Layer or not layer.is_initialized:
            return None
        pools = [getattr(layer, name) for name in POOLS]
        values = tuple(getattr(layer, name) for name in LAYER)
        parts.append((values, tuple((*_kind(pool), _ones(pool)) for pool in pools)))
    return tuple(parts)


def _attention(model: torch.nn.Module) -> Identity:
    """The function that transformers calls for attention, which a module finds by its name."""
    name = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return bodies(ALL_ATTENTION_FUNCTIONS.get(name))


def _kind(tensor: torch.Tensor) -> Identity:
    return (
        type(tensor).__name__,
        str(tensor.dtype),
        tensor.device.type,
        tensor.requires_grad,
        tensor.is_contiguous(),
        dispatch_keys(tensor),
    )


def _ones(tensor: torch.Tensor) -> Identity:
    """Which sizes are 1: Dynamo makes graphs of their own for them."""
    return tuple(size == 1 for size in tensor.shape)


def _plain(value: Any, seen: dict[int, int]) -> Any:
    """`value` by its plain parts: of a config its attributes, of other objects their type."""
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, (FunctionType, MethodType)):
        return value.__qualname__
    if isinstance(value, dict):
        return tuple((str(k), _plain(v, seen)) for k, v in value.items() if k not in NAMES)
    if isinstance(value, (list, tuple)):
        return tuple(_plain(each, seen) for each in value)
    if type(value).__module__.startswith("transformers.") and hasattr(value, "to_dict"):
        if id(value) in seen:
            return seen[id(value)]
        seen[id(value)] = len(seen)
        return (type(value).__qualname__, _plain(vars(value), seen))
    return type(value).__qualname__


def _moving(model: torch.nn.Module) -> bool:
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        kinds = kind.values() if isinstance(kind, dict) else [kind]
        if not MOVING_ROPE.isdisjoint(kinds):
            return True
    return False
