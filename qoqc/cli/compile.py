"""`qoqc compile`: a model in, an artifact out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qoqc.artifact.folder import require_free
from qoqc.artifact.manifest import is_artifact
from qoqc.artifact.save import save
from qoqc.cli.inspect import size
from qoqc.cli.progress import steps
from qoqc.cli.source import (
    choose_device,
    choose_dtype,
    load_config,
    load_model,
    load_tokenizer,
    prepare,
)
from qoqc.config import Options


def run(
    model_name: str,
    output: str,
    raw_options: Mapping[str, Any],
    *,
    device: str,
    dtype: str,
    force: bool,
) -> None:
    """Load, pack, write; prints one closing line. Cheap checks come before the slow loading."""
    start = time.perf_counter()
    options = Options.parse(raw_options)
    target, where, kind = Path(output), choose_device(device), choose_dtype(dtype)
    require_free(target, overwrite=force, is_ours=is_artifact)
    prepare()
    with steps() as shown:
        shown.start(f"Loading {model_name}")
        load_config(model_name)
        tokenizer = load_tokenizer(model_name)
        model = load_model(model_name, where, kind)
        shown.start("Packing weights")
        manifest = save(
            model, target, tokenizer, options=options, overwrite=force, progress=shown.update
        )
        shown.finish()
    left = sorted({r["name"] for graph in manifest.graphs for r in graph["refusals"]})
    seconds = time.perf_counter() - start
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
