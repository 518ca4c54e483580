"""What a calibration chose and what the gate found, as a person reads it.

From plain values, as the manifest holds them, so that `qoqc inspect` and `qoqc eval` of an artifact
say what `qoqc compile` said when it was made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from qoqc.artifact.manifest import Manifest
from qoqc.errors import ArtifactError

COLUMNS = ("layer", "keys", "values", "down", "KV", "KV error", "SQNR dB")


def show_artifact(manifest: Manifest, name: str) -> None:
    """How the artifact `name` was calibrated and what the gate found; one line if it was not.

    Raises ArtifactError for a manifest whose recipe or gate is not what a calibration writes.
    """
    if manifest.recipe is None:
        print("recipe: rounded to nearest, not judged")
        return
    try:
        show_record(manifest.recipe)
        if manifest.gate is not None:
            print(gate_line(manifest.gate))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"{name}: the manifest's recipe or gate cannot be read ({error!r}); compile it again"
        ) from error


def show_record(recipe: Mapping[str, Any]) -> None:
    """A row per layer, what was left out, and what the searches cost; `recipe`: Record.entry()."""
    layers = recipe["layers"]
    table = Table(*COLUMNS)
    for layer in layers:
        table.add_row(*layer_row(layer))
    Console(highlight=False).print(table)
    refused = (*recipe["refused"], *(reason for layer in layers for reason in layer["refused"]))
    for line in dict.fromkeys(refused):
        print(f"  left out: {line}")
    trials = sum(int(s["trials"]) for layer in layers for s in layer["strengths"].values())
    print(
        f"calibrated on {recipe['samples']} windows of {recipe['seq']} tokens; {trials} trials for "
        f"alpha and beta; {recipe['kv_mean']:.2f} bits per key and value on average"
    )


def layer_row(layer: Mapping[str, Any]) -> tuple[str, ...]:
    """`alpha/beta` of each smoothing, KV bits and their error, SQNR."""
    strengths = layer["strengths"]
    downs = [found for name, found in strengths.items() if name not in ("attention", "values")]
    chosen = [strengths.get("attention"), strengths.get("values"), downs[0] if downs else None]
    pairs = ["-" if s is None else f"{s['alpha']:g}/{s['beta']:g}" for s in chosen]
    kv = layer["kv"] or {"bits": "-", "errors": {}}
    error = kv["errors"].get(str(kv["bits"]), kv["errors"].get("4"))
    sqnr = layer["sqnr"]
    return (
        layer["name"],
        *pairs,
        str(kv["bits"]),
        "-" if error is None else f"{error:.3f}",
        "-" if sqnr is None else f"{sqnr:.1f}",
    )


def gate_line(gate: Mapping[str, Any]) -> str:
    """`perplexity 64.2340, 61.9040 in 16 bit (+3.76 %); KL ...; same top-1 ...; on what text`."""
    return (
        f"perplexity {gate['perplexity']:.4f}, {gate['baseline']:.4f} in 16 bit "
        f"({gate['increase']:+.2f} %); KL {gate['kl']:.5f}; same top-1 "
        f"{100 * gate['agreement']:.2f} %; {gate['windows']} windows of {gate['seq']}, "
        f"{gate['text']}"
    )


def kv_text(kv_bits: int, kv_layers: Sequence[int]) -> str:
    """`4`, or the mean of bits that differ by layer: `4.5`."""
    return f"{sum(kv_layers) / len(kv_layers):g}" if kv_layers else str(kv_bits)
