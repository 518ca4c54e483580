"""Artifacts: a compiled model as a directory that loads without the original weights.

What Hugging Face expects (config.json, tokenizer, safetensors files, a card), and below qoqc/ the
manifest, the kernels and the tuning entries they were chosen by. A packed weight of the module
`up_proj` is stored as `up_proj.qweight`, `.channel_scale` and `.group_word` or `.channel_zero`;
everything else under its own name.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from qoqc.artifact.folder import locked, publish, require_free
from qoqc.artifact.kernel_files import write_kernels
from qoqc.artifact.kernel_sources import devices
from qoqc.artifact.launches import summary
from qoqc.artifact.manifest import (
    GRAPHS,
    Manifest,
    WeightEntry,
    graph_entry,
    is_artifact,
    quantization_config,
    stored_name,
)
from qoqc.artifact.shards import MAX_SHARD, write_shards
from qoqc.artifact.survey import Progress, Survey, survey
from qoqc.artifact.write import complete
from qoqc.config import Options
from qoqc.errors import ArtifactError, Unsupported
from qoqc.runtime.packed_linear import named_tensors
from qoqc.runtime.weights import STORE

SAVED_OPTIONS = ("group_size", "kv_bits", "kv_layers", "prefill_kv", "lm_head", "exclude", "strict")
"""The options that shape what is packed and how it runs; the others belong to one process."""


@dataclasses.dataclass(frozen=True)
class Extras:
    """What goes into an artifact beside the model.

    recipe, gate    go into the manifest as they are, see there
    base_model      what the model was made from, for the card
    archs           compute capabilities (90 = sm_90) to compile the kernels for
    max_shard_size  of a weight file: bytes, or a size such as "5GB"
    """

    recipe: dict[str, Any] | None = None
    gate: dict[str, Any] | None = None
    base_model: str | None = None
    archs: tuple[int, ...] = ()
    max_shard_size: int | str = MAX_SHARD


def save(
    model: Any,
    directory: str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    options: Options | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **extras: Any,
) -> Manifest:
    """Pack what is not packed yet and write the model as an artifact; returns its manifest.

    options    default: those that qoqc.compile was called with, else Options()
    overwrite  replace an artifact of that name (never another kind of directory)
    extras     see Extras

    Raises ArtifactError if the directory is taken, or another process writes it now; Unsupported
    for models the passes do not take, and for one rank's part of a model.
    """
    _require_whole(model)
    target, more = Path(directory), Extras(**extras)
    options = options or getattr(model, "qoqc_options", None) or Options()
    with locked(target):
        require_free(target, overwrite=overwrite, is_ours=is_artifact)
        found = survey(model, options, progress)
        with publish(target, overwrite=overwrite, is_ours=is_artifact) as draft:
            manifest = _write(model, tokenizer, options, found, more, draft)
    return manifest


def _require_whole(model: Any) -> None:
    """Raise Unsupported for a model that is split among processes (qoqc/parallel)."""
    membership = getattr(model, "qoqc_parallel", None)
    if membership is not None and membership.ranks.size > 1:
        ranks = membership.ranks
        raise Unsupported(
            f"{type(model).__name__} is part {ranks.rank} of {ranks.size} here and makes no whole "
            "artifact; load it without tp in one process, and save that"
        )


def _write(
    model: Any, tokenizer: Any, options: Options, found: Survey, extras: Extras, draft: Path
) -> Manifest:
    """Write everything below `draft`; returns the manifest."""
    chosen = {name: getattr(options, name) for name in SAVED_OPTIONS}
    plain_options = {k: list(v) if isinstance(v, tuple) else v for k, v in chosen.items()}
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    config.quantization_config = quantization_config(plain_options)
    config.save_pretrained(draft)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(draft)
    if tokenizer is not None:
        tokenizer.save_pretrained(draft)
    tensors = _collect(model, found)
    manifest = Manifest(
        architecture=type(model).__name__,
        versions=versions(),
        options=plain_options,
        weights=tensors.weights,
        tensors=tensors.plain,
        aliases=tensors.aliases,
        graphs=_write_graphs(found, model.device, draft),
        bytes_before=tensors.bytes_before,
        bytes_after=sum(t.numel() * t.element_size() for t in tensors.stored.values()),
        files={},
        shards=write_shards(tensors.stored, draft, extras.max_shard_size),
        base_model=extras.base_model,
        kernels=write_kernels(found.kernels, model.device, draft, extras.archs),
        recipe=extras.recipe,
        gate=extras.gate,
    )
    return complete(manifest, draft)


def _write_graphs(found: Survey, device: torch.device, draft: Path) -> list[dict[str, Any]]:
    """Write the graphs as text below `draft`; returns the manifest's entries for them."""
    (draft / GRAPHS).mkdir(parents=True)
    entries: list[dict[str, Any]] = []
    for report, text in zip(found.reports, found.listings, strict=True):
        before = sum(entry["graph"] == report.graph for entry in entries)
        name = f"{report.graph}-{before + 1}" if before else report.graph
        entry = {**graph_entry(report), "file": f"{GRAPHS}/{name}.txt"}
        if name == "decode":
            entry["launches"] = {
                "device": devices(device)[-1].name,
                "layers": summary(found.launches),
            }
        (draft / entry["file"]).write_text(text)
        entries.append(entry)
    return entries


@dataclasses.dataclass
class _Tensors:
    """The tensors of a model as they are stored, and what the manifest says of them."""

    stored: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    weights: dict[str, WeightEntry] = dataclasses.field(default_factory=dict)
    plain: list[str] = dataclasses.field(default_factory=list)
    aliases: dict[str, str] = dataclasses.field(default_factory=dict)
    bytes_before: int = 0


def _collect(model: Any, found: Survey) -> _Tensors:
    refs = {id(ref.param): ref for ref in found.weights}
    names: dict[int, str] = {}
    tensors = _Tensors()
    for name, value in named_tensors(model):
        if id(value) in names:
            tensors.aliases[name] = names[id(value)]
            continue
        names[id(value)] = name
        tensors.bytes_before += value.numel() * value.element_size()
        if id(value) in refs:
            packed = STORE.packed(refs[id(value)].param)
            assert packed is not None, "survey() packs every weight it names"
            tensors.weights[name] = WeightEntry.of(packed, refs[id(value)].transposed, value.dtype)
            parts = packed.tensors().items()
            tensors.stored.update({stored_name(name, field): part for field, part in parts})
        elif STORE.is_released(value):
            raise ArtifactError(
                f"{name} was released after packing, and the options given now leave it in "
                "16 bit; load the model again and save it with these options"
            )
        else:
            # a clone: views of one storage are written as tensors of their own
            copied = value.detach().clone(memory_format=torch.contiguous_format)
            tensors.stored[name] = copied
            tensors.plain.append(name)
    return tensors


def versions() -> dict[str, str]:
    """What the outcome may depend on: Python, torch, qoqc, transformers, triton."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("qoqc", "transformers", "triton"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # triton exists for Linux only
            found[package] = "not installed"
    return found
