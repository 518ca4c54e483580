"""`qoqc convert`: a checkpoint that others quantized to an artifact, or an artifact to QServe's."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from qoqc.artifact.folder import publish, require_free
from qoqc.artifact.load import load_model
from qoqc.artifact.manifest import is_artifact
from qoqc.artifact.save import save
from qoqc.cli.inspect import size
from qoqc.cli.progress import steps
from qoqc.cli.source import choose_dtype, load_config, load_tokenizer, prepare
from qoqc.config import Options
from qoqc.errors import OptionError
from qoqc.formats.build import build_model, qserve_tensors
from qoqc.formats.source import Change, load_source

TARGETS = ("qoqc", "qserve")


def run(
    source: str,
    output: str,
    raw_options: Mapping[str, Any],
    *,
    to: str,
    dtype: str,
    force: bool,
) -> None:
    """Convert and print one closing line, and how far weights moved."""
    if to not in TARGETS:
        raise OptionError(f"--to {to}: expected one of {', '.join(TARGETS)}")
    if to == "qoqc":
        _import(source, Path(output), Options.parse(raw_options), choose_dtype(dtype), force)
    else:
        _export(Path(source), Path(output))


def _import(
    name: str, target: Path, options: Options, dtype: torch.dtype | str, force: bool
) -> None:
    start = time.perf_counter()
    require_free(target, overwrite=force, is_ours=is_artifact)
    prepare()
    with steps() as shown:
        shown.start(f"Reading {name}")
        source = load_source(name, options.group_size, shown.update)
        config, tokenizer = load_config(name), load_tokenizer(name)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # transformers would ask for the other library
        stored = getattr(config, "dtype", None) or torch.float16
        shown.start("Building the model")
        model, left = build_model(source, config, stored if isinstance(dtype, str) else dtype)
        shown.start("Writing the artifact")
        chosen = dataclasses.replace(options, group_size=source.group_size)
        manifest = save(
            model, target, tokenizer, options=chosen, overwrite=force, progress=shown.update
        )
        shown.finish()
    _show_changes(source.report)
    for weight in left:
        print(f"  left in 16 bit: {weight}, which the model keeps in a merged tensor")
    print(
        f"{target}: {len(manifest.weights)} linears from {source.kind}; "
        f"{size(manifest.bytes_before)} in 16 bit -> {size(manifest.bytes_after)}; "
        f"{time.perf_counter() - start:.1f} s"
    )


def _show_changes(report: tuple[Change, ...]) -> None:
    anew = [change for change in report if change.requantized]
    kept = len(report) - len(anew)
    if kept:
        worst = max(change.error for change in report if not change.requantized)
        exact = "bit for bit" if not worst else f"scaled zeros rounded, error {worst:.1e} at most"
        print(f"{kept} linears keep their integers ({exact})")
    if anew:
        worst_one = max(anew, key=lambda change: change.error)
        mean = statistics.mean(change.error for change in anew)
        print(
            f"{len(anew)} linears rounded to another grid: relative RMS error {mean:.4f} on "
            f"average, {worst_one.error:.4f} at worst ({worst_one.name})"
        )


def _export(source: Path, target: Path) -> None:
    start = time.perf_counter()
    # what was exported is nobody's to replace: it carries no mark of qoqc
    require_free(target, overwrite=False, is_ours=is_artifact)
    prepare()
    with steps() as shown:
        shown.start(f"Loading {source}")
        model, _ = load_model(source)
        tokenizer = load_tokenizer(str(source))
        shown.start("Writing the checkpoint")
        tensors = qserve_tensors(model)
        with publish(target, overwrite=False, is_ours=is_artifact) as draft:
            model.config.dtype = torch.float16
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            model.config.save_pretrained(draft)
            if tokenizer is not None:
                tokenizer.save_pretrained(draft)
            save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})
            mode = (draft / "config.json").stat().st_mode
            (draft / "model.safetensors").chmod(mode)  # safetensors makes it the owner's alone
        shown.finish()
    count = sum(name.endswith(".qweight") for name in tensors)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    print(
        f"{target}: {count} linears for QServe, {size(total)}; {time.perf_counter() - start:.1f} s"
    )
