"""`qoqc.compile(model)`: after it, plain `model.generate(...)` runs in W4A8KV4."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, TypeVar

import torch

from qoqc.artifact.load import load_model
from qoqc.config import Options, records_enabled
from qoqc.decode import loop
from qoqc.decode.caches import CacheProvider
from qoqc.errors import ArtifactError, Unsupported
from qoqc.parallel import load as parallel
from qoqc.parallel.ranks import Count, join
from qoqc.records.replay import Records, digest_of
from qoqc.runtime import attention_interface
from qoqc.runtime.weights import STORE

Model = TypeVar("Model", bound=torch.nn.Module)

WITHOUT_GRAPHS: dict[str, str] = {
    "reduce-overhead": "default",
    "max-autotune": "max-autotune-no-cudagraphs",
}
"""Inductor's modes that put CUDA graphs around what it compiles, and the same without."""


def compile(model: Model, **options: Any) -> Model:
    """Compile a Hugging Face decoder in place with the backend "qoq" and give it a KV4 cache.

    options are those of qoqc.config.Options; for a model that from_pretrained read from an
    artifact they replace those it was made with. Raises OptionError for bad options, Unsupported
    for models that are not decoders. Returns the same model.
    """
    attributes: Any = model
    if getattr(model, "hf_quantizer", None) is not None and hasattr(model, "qoqc_options"):
        options = dataclasses.asdict(_replaced(attributes.qoqc_options, options, "the artifact"))
    parsed = Options.parse(options)
    if hasattr(model, "qoqc_parallel"):
        own = attributes.qoqc_parallel.exclude(parsed.lm_head)
        options["exclude"] = [*parsed.exclude, *own]
        parsed = Options.parse(options)
    require_decoder(model)
    parsed.layer_bits(attributes.config.get_text_config(decoder=True).num_hidden_layers)
    model.requires_grad_(False)
    STORE.note_tables_of(model)
    graphs = parsed.graphs and parsed.kv_bits != 16
    if graphs and parsed.mode in WITHOUT_GRAPHS:
        # the decode loop captures whole steps, and a capture cannot hold another
        options["mode"] = WITHOUT_GRAPHS[parsed.mode]
    model.compile(backend="qoq", options=options or None)
    attributes.qoqc_options = parsed  # what qoqc.save records
    if parsed.kv_bits != 16:
        attention_interface.adopt(model)
        loop.install(model, graphs, _records(model, parsed))
        caches = CacheProvider(model, parsed)
        attributes.qoqc_caches = caches
        # transformers has no registry for caches: this method is where generate() makes one
        attributes._prepare_cache_for_generation = caches.prepare
    return model


def _records(model: Any, options: Options) -> Records | None:
    """The records of a model's calls, if they are switched on, and can stand for its tracing.

    They need an artifact, which says what the model is. Inductor's CUDA graphs, and code that is
    to be looked at, are made by tracing.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    manifest = getattr(quantizer, "manifest", None)
    traced = options.mode in WITHOUT_GRAPHS and not options.graphs
    if not records_enabled() or manifest is None or hasattr(model, "qoqc_parallel"):
        return None
    if traced or options.dump is not None or options.glue != "inductor":
        return None
    return Records(model, options, digest_of(manifest))


def load(
    directory: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    *,
    tp: Count | None = None,
    tp_exact: bool = False,
    **options: Any,
) -> Any:
    """The model of an artifact, compiled; `options` replace those it was made with.

    tp        split it among so many processes, or "auto" = among all that were started together
              (by torchrun), each of which calls this and later generate() alike: docs/parallel.md
    tp_exact  the integers that one process would sum, for two more exchanges per layer

    Raises ArtifactError if the artifact is missing, damaged, of another format version, or packed
    with another group_size; OptionError for bad options; Unsupported for a model that cannot be
    split among so many.
    """
    Options.parse(options)  # bad ones before anything is read
    if tp is None:
        model, made_with = load_model(directory, device)
    else:
        model, made_with = parallel.load_model(
            directory, join(tp, device), exact=tp_exact, lm_head=options.get("lm_head")
        )
    chosen = _replaced(made_with, options, str(directory))
    return compile(model, **dataclasses.asdict(chosen))


def _replaced(made_with: Options, options: dict[str, Any], artifact: str) -> Options:
    """The options an artifact was made with, but for those that are given."""
    given = Options.parse(options)
    if "group_size" in options and given.group_size != made_with.group_size:
        raise ArtifactError(
            f"{artifact} was packed with group_size={made_with.group_size}, asked for is "
            f"{given.group_size}; compile the model again"
        )
    changed = {name: getattr(given, name) for name in options}
    if "kv_bits" in options and "kv_layers" not in options:
        changed["kv_layers"] = ()  # asked for in every layer
    return dataclasses.replace(made_with, **changed)


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
