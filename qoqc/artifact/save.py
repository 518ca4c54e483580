"""Artifacts: a compiled model as a directory that loads without the original weights.

Beside what Hugging Face expects (config.json, tokenizer, model.safetensors): qoqc/manifest.json
and qoqc/kernels/*.py. A packed weight is stored under its Parameter's name with the suffixes
`.qweight`, `.channel_scale`, `.group_word` or `.channel_zero`; everything else under its own name.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from qoqc.artifact.folder import checksum, files_below, publish, require_free
from qoqc.artifact.kernel_sources import sources
from qoqc.artifact.manifest import (
    KERNELS,
    PATH,
    WEIGHTS,
    Manifest,
    WeightEntry,
    graph_entry,
    is_artifact,
)
from qoqc.artifact.survey import Progress, Survey, survey
from qoqc.config import Options
from qoqc.errors import ArtifactError
from qoqc.runtime.weights import STORE

SAVED_OPTIONS = ("group_size", "kv_bits", "kv_layers", "prefill_kv", "exclude", "strict")
"""The options that shape what is packed and how it runs; the others belong to one process."""


def save(
    model: Any,
    directory: str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    options: Options | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    recipe: dict[str, Any] | None = None,
    gate: dict[str, Any] | None = None,
) -> Manifest:
    """Pack what is not packed yet and write the model as an artifact; returns its manifest.

    options    default: those that qoqc.compile was called with, else Options()
    overwrite  replace an artifact of that name (never another kind of directory)
    recipe, gate  go into the manifest as they are, see there

    Raises ArtifactError if the directory is taken, Unsupported for models the passes do not take.
    """
    target = Path(directory)
    require_free(target, overwrite=overwrite, is_ours=is_artifact)
    options = options or getattr(model, "qoqc_options", None) or Options()
    found = survey(model, options, progress)
    with publish(target, overwrite=overwrite, is_ours=is_artifact) as draft:
        model.config.save_pretrained(draft)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(draft)
        if tokenizer is not None:
            tokenizer.save_pretrained(draft)
        manifest = _write_tensors(model, options, found, draft)
        manifest = dataclasses.replace(manifest, recipe=recipe, gate=gate)
        manifest.write(draft)
    return manifest


def _write_tensors(model: Any, options: Options, found: Survey, draft: Path) -> Manifest:
    """Write the tensors and the kernels; returns the manifest of all that is in `draft`."""
    refs = {id(ref.param): ref for ref in found.weights}
    names: dict[int, str] = {}
    aliases: dict[str, str] = {}
    weights: dict[str, WeightEntry] = {}
    plain: dict[str, torch.Tensor] = {}
    tensors: dict[str, torch.Tensor] = {}
    before = 0
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) in names:
            aliases[name] = names[id(value)]
            continue
        names[id(value)] = name
        before += value.numel() * value.element_size()
        if id(value) in refs:
            packed = STORE.packed(value)
            assert packed is not None, "survey() packs every weight it names"
            weights[name] = WeightEntry.of(packed, refs[id(value)].transposed, value.dtype)
            tensors.update({f"{name}.{k}": t for k, t in packed.tensors().items()})
        elif STORE.is_released(value):
            raise ArtifactError(
                f"{name} was released after packing, and the options given now leave it in "
                "16 bit; load the model again and save it with these options"
            )
        else:
            # a clone: views of one storage are written as tensors of their own
            plain[name] = value.detach().clone(memory_format=torch.contiguous_format)
    tensors.update(plain)
    save_file(tensors, draft / WEIGHTS, metadata={"format": "pt"})
    # safetensors makes it readable for the owner only, unlike the files beside it
    (draft / WEIGHTS).chmod((draft / "config.json").stat().st_mode)
    _write_kernels(found, model.device, draft)
    chosen = {name: getattr(options, name) for name in SAVED_OPTIONS}
    return Manifest(
        architecture=type(model).__name__,
        versions=versions(),
        options={k: list(v) if isinstance(v, tuple) else v for k, v in chosen.items()},
        weights=weights,
        tensors=list(plain),
        aliases=aliases,
        graphs=[graph_entry(report) for report in found.reports],
        bytes_before=before,
        bytes_after=sum(t.numel() * t.element_size() for t in tensors.values()),
        files={name: checksum(path) for name, path in files_below(draft).items() if name != PATH},
    )


def _write_kernels(found: Survey, device: torch.device, draft: Path) -> None:
    folder = draft / KERNELS
    folder.mkdir(parents=True)
    for name, text in sources(found.kernels, device).items():
        (folder / name).write_text(text)


def versions() -> dict[str, str]:
    """What the outcome may depend on: Python, torch, qoqc, transformers, triton."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("qoqc", "transformers", "triton"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # triton exists for Linux only
            found[package] = "not installed"
    return found
