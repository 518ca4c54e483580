"""`qoqc compile`: a model in, an artifact out."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qoqc.artifact.folder import require_free
from qoqc.artifact.manifest import Manifest, is_artifact
from qoqc.artifact.save import save
from qoqc.calibrate.checkpoint import partial_directory
from qoqc.calibrate.recipe import LayerRecord, Record
from qoqc.cli.calibration import Settings, read_corpus, run_recipe
from qoqc.cli.inspect import size
from qoqc.cli.progress import Steps, steps
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
    require_free(target, overwrite=force, is_ours=is_artifact)
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
            overwrite=force,
            progress=shown.update,
            recipe=None if record is None else record.entry(),
            gate=gate,
        )
        shown.finish()
    if record is not None:
        _show_record(record)
    if gate is not None:
        _show_gate(gate)
    _show_closing(output, manifest, time.perf_counter() - start)
    return 0 if gate is None else _judge(gate, settings.max_ppl_increase)


def _show_record(record: Record) -> None:
    """A row per layer, what was left out, and what the searches cost."""
    table = Table("layer", "keys", "values", "down", "KV", "KV error", "SQNR dB")
    for layer in record.layers:
        table.add_row(*_row(layer))
    Console(highlight=False).print(table)
    for line in dict.fromkeys((*record.refused, *(r for x in record.layers for r in x.refused))):
        print(f"  left out: {line}")
    print(
        f"calibrated on {record.samples} windows of {record.seq} tokens; {record.trials()} trials "
        f"for alpha and beta; {record.kv_mean():.2f} bits per key and value on average"
    )


def _row(layer: LayerRecord) -> tuple[str, ...]:
    """`alpha/beta` of each smoothing, KV bits and their error, SQNR."""
    downs = [s for name, s in layer.strengths.items() if name not in ("attention", "values")]
    found = [layer.strengths.get("attention"), layer.strengths.get("values"), *downs[:1]]
    pairs = ["-" if s is None else f"{s['alpha']:g}/{s['beta']:g}" for s in found]
    kv = layer.kv or {"bits": "-", "errors": {}}
    error = kv["errors"].get(str(kv["bits"]), kv["errors"].get("4"))
    shown = "-" if error is None else f"{error:.3f}"
    sqnr = "-" if layer.sqnr is None else f"{layer.sqnr:.1f}"
    return (layer.name, *pairs, *["-"] * (3 - len(pairs)), str(kv["bits"]), shown, sqnr)


def _show_gate(gate: Mapping[str, Any]) -> None:
    print(
        f"perplexity {gate['perplexity']:.4f}, {gate['baseline']:.4f} in 16 bit "
        f"({gate['increase']:+.2f} %); KL {gate['kl']:.5f}; same top-1 "
        f"{100 * gate['agreement']:.2f} %; {gate['windows']} windows of {gate['seq']}, "
        f"{gate['text']}"
    )


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
