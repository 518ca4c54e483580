"""`qoqc.compile(model)`: after it, plain `model.generate(...)` runs in W4A8KV4."""

from __future__ import annotations

import dataclasses
import os
import types
from typing import Any, TypeVar

import torch
from transformers.cache_utils import DynamicCache

from qoqc.artifact.load import load_model
from qoqc.config import Options
from qoqc.errors import ArtifactError, Unsupported
from qoqc.ir.spec import KVSpec
from qoqc.runtime.kv_cache import KV4Cache
from qoqc.runtime.weights import STORE

Model = TypeVar("Model", bound=torch.nn.Module)

MIN_CACHE = 256
"""Smallest cache allocated, in tokens: sizes grow in powers of two from here, so that generations
of similar length share a compiled graph."""


def compile(model: Model, **options: Any) -> Model:
    """Compile a Hugging Face decoder in place with the backend "qoq" and give it a KV4 cache.

    options are those of qoqc.config.Options. Raises OptionError for bad options and Unsupported
    for models that are not decoders. Returns the same model.
    """
    parsed = Options.parse(options)
    require_decoder(model)
    attributes: Any = model
    parsed.layer_bits(attributes.config.get_text_config(decoder=True).num_hidden_layers)
    model.requires_grad_(False)
    STORE.note_tables_of(model)
    model.compile(backend="qoq", options=options or None)
    attributes.qoqc_options = parsed  # what qoqc.save records
    if parsed.kv_bits != 16:
        provider = _CacheProvider(model, parsed)
        # transformers has no registry for caches: this method is where generate() makes one
        attributes._prepare_cache_for_generation = types.MethodType(provider.prepare, model)
    return model


def load(
    directory: str | os.PathLike[str], device: str | torch.device = "cpu", **options: Any
) -> Any:
    """The model of an artifact, compiled; `options` replace those it was made with.

    Raises ArtifactError if the artifact is missing, damaged, of another format version, or packed
    with another group_size; OptionError for bad options.
    """
    given = Options.parse(options)
    model, made_with = load_model(directory, device)
    if "group_size" in options and given.group_size != made_with.group_size:
        raise ArtifactError(
            f"{directory} was packed with group_size={made_with.group_size}, asked for is "
            f"{given.group_size}; compile the model again"
        )
    changed = {name: getattr(given, name) for name in options}
    if "kv_bits" in options and "kv_layers" not in options:
        changed["kv_layers"] = ()  # asked for in every layer
    chosen = dataclasses.replace(made_with, **changed)
    return compile(model, **dataclasses.asdict(chosen))


def require_decoder(model: torch.nn.Module) -> None:
    """Raise Unsupported unless `model` is a Hugging Face decoder that can generate."""
    config = getattr(model, "config", None)
    kind = type(model).__name__
    if config is None or not hasattr(model, "generate"):
        raise Unsupported(
            f"{kind} is not a Hugging Face causal language model; "
            'for other modules use torch.compile(module, backend="qoq")'
        )
    if getattr(config, "is_encoder_decoder", False):
        raise Unsupported(f"{kind} is an encoder-decoder model; qoqc compiles decoders only")


class _CacheProvider:
    """Hands generate() a KV4Cache, the same one again while batch and length fit."""

    def __init__(self, model: Any, options: Options) -> None:
        self._options = options
        self._default = model._prepare_cache_for_generation
        self._specs: list[KVSpec] | None = None
        self._cache: KV4Cache | None = None
        self._batch = 0

    def prepare(
        self,
        model: Any,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """The replacement for GenerationMixin._prepare_cache_for_generation."""
        # generate() would wrap the forward once more for compileable caches
        generation_config.disable_compile = True
        chosen = (
            model_kwargs.get("past_key_values") is not None
            or generation_config.use_cache is False
            or generation_config.cache_implementation is not None
        )
        if chosen:
            return self._default(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        beams = max(generation_config.num_beams, generation_config.num_return_sequences)
        model_kwargs["past_key_values"] = self._get(model, batch_size * beams, max_cache_length)
        return None

    def _get(self, model: Any, batch: int, length: int) -> KV4Cache:
        fits = self._cache is not None and self._cache.get_max_length() >= length
        if self._cache is None or not fits or self._batch != batch:
            if self._specs is None:
                self._specs = probe_kv(model)
            capacity = max(MIN_CACHE, 1 << (length - 1).bit_length())
            self._cache = KV4Cache(
                model.config,
                capacity,
                self._options.kv_layers or self._options.kv_bits,
                self._options.prefill_kv,
                # it makes its own masks for generate(), maybe of the cache's full length
                whole_prefill=hasattr(model, "create_masks_for_generate"),
            )
            self._cache.allocate(batch, self._specs, model.device, model.dtype)
            self._batch = batch
        self._cache.reset()
        return self._cache


def probe_kv(model: Any) -> list[KVSpec]:
    """Each layer's KV head count and head sizes, read off one eager step on a 16-bit cache.

    Asking the cache works for every attention (MLA, per-layer sizes); config names differ.
    Raises Unsupported when a layer keeps no keys and values (linear attention, state space).
    """
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    with torch.no_grad():
        model.forward(input_ids=token, past_key_values=cache, use_cache=True)
    specs = []
    for number, layer in enumerate(cache.layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or keys.dim() != 4:
            raise Unsupported(f"layer {number} keeps no keys and values; compile with kv_bits=16")
        specs.append(KVSpec(keys.shape[1], keys.shape[-1], values.shape[-1]))
    return specs
