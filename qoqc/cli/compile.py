"""`qoqc compile`: a model in, an artifact out."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qoqc.artifact.folder import require_free
from qoqc.artifact.kernel_sources import devices
from qoqc.artifact.manifest import Manifest, is_artifact
from qoqc.artifact.save import save
from qoqc.artifact.shards import MAX_SHARD, require_size
from qoqc.calibrate.checkpoint import partial_directory
from qoqc.calibrate.recipe import Record
from qoqc.cli.calibration import Settings, read_corpus, run_recipe
from qoqc.cli.inspect import size
from qoqc.cli.progress import Steps, steps
from qoqc.cli.record import gate_line, show_record
from qoqc.cli.source import (
    choose_device,
    choose_dtype,
    load_config,
    load_model,
    load_tokenizer,
    prepare,
)
from qoqc.config import Options
from qoqc.errors import OptionError


@dataclasses.dataclass(frozen=True)
class Files:
    """What is written, and over what.

    force           replace an artifact
    max_shard_size  of a weight file
    arch            GPUs whose machine code is written too: "sm_80,sm_90"; empty: none
    """

    force: bool = False
    max_shard_size: str = MAX_SHARD
    arch: str = ""

    def archs(self) -> tuple[int, ...]:
        """Compute capabilities. Raises OptionError for bad values of this and the sizes."""
        require_size(self.max_shard_size)
        names = [name.strip() for name in self.arch.split(",") if name.strip()]
        found = [re.fullmatch(r"(?:sm_)?(\d{2,3})", name) for name in names]
        for name, match in zip(names, found, strict=True):
            if match is None:
                raise OptionError(f"--arch {name}: expected names such as sm_80,sm_90")
        archs = tuple(dict.fromkeys(int(match[1]) for match in found if match is not None))
        devices(torch.device("cpu"), archs)
        return archs


def run(
    model_name: str,
    output: str,
    raw_options: Mapping[str, Any],
    *,
    device: str,
    dtype: str,
    files: Files,
    settings: Settings | None = None,
) -> int:
    """Load, calibrate if the settings say so, pack, write; prints what came of it.

    Cheap checks come before the slow loading. Returns the exit code: 1 if the perplexity rose by
    more than the settings allow (the artifact is written all the same), else 0.
    """
    start = time.perf_counter()
    settings = settings or Settings()
    options = Options.parse(raw_options)
    target, where, kind = Path(output), choose_device(device), choose_dtype(dtype)
    calibrates = settings.calibrates()
    archs = files.archs()
    require_free(target, overwrite=files.force, is_ours=is_artifact)
    prepare()
    record: Record | None = None
    gate: dict[str, Any] | None = None
    with contextlib.ExitStack() as stack:
        shown: Steps = stack.enter_context(steps())
        shown.start(f"Loading {model_name}")
        config, tokenizer = load_config(model_name), load_tokenizer(model_name)
        text = read_corpus(model_name, config, tokenizer, settings) if calibrates else None
        # after the checks of the input, before the work
        partial = stack.enter_context(partial_directory(target)) if calibrates else None
        model = load_model(model_name, where, kind)
        if text is not None and partial is not None:
            done = run_recipe(model, model_name, text, settings, options, partial, shown)
            options, record, gate = done.options, done.record, done.gate
        shown.start("Packing weights")
        manifest = save(
            model,
            target,
            tokenizer,
            options=options,
            overwrite=files.force,
            progress=shown.update,
            # a directory's path is nobody's business who downloads the artifact
            base_model=Path(model_name).resolve().name if Path(model_name).is_dir() else model_name,
            max_shard_size=files.max_shard_size,
            archs=archs,
            recipe=None if record is None else record.entry(),
            gate=gate,
        )
        shown.finish()
    if record is not None:
        show_record(record.entry())
    if gate is not None:
        print(gate_line(gate))
    _show_closing(output, manifest, time.perf_counter() - start)
    return 0 if gate is None else _judge(gate, settings.max_ppl_increase)


def _judge(gate: Mapping[str, Any], limit: float | None) -> int:
    """1 if the increase is beyond the limit, NaN included."""
    if limit is None or gate["increase"] <= limit:
        return 0
    line = f"the perplexity increase of {gate['increase']:.2f} % is above the limit of {limit:g} %"
    print(f"qoqc: {line}", file=sys.stderr)
    return 1


def _show_closing(output: str, manifest: Manifest, seconds: float) -> None:
    left = sorted({r["name"] for graph in manifest.graphs for r in graph["refusals"]})
    print(
        f"{output}: {len(manifest.weights)} linears packed, "
        f"{len(left)} left in 16 bit{_names(left)}; "
        f"{size(manifest.bytes_before)} -> {size(manifest.bytes_after)}; {seconds:.1f} s"
    )


def _names(names: list[str]) -> str:
    """A few names in parentheses; `qoqc inspect` shows all with their reasons."""
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f" ({', '.join(names[:3])}{more})"
