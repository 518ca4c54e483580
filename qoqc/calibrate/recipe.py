"""What the recipe is to do, and the record of what it did: plain values, as the manifest holds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from qoqc.calibrate.alpha import Search
from qoqc.calibrate.kv_bits import KVChoice
from qoqc.calibrate.weight_step import WeightOptions
from qoqc.errors import OptionError

GroupSize = Literal[128, -1]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The techniques of QoQ (arXiv 2405.04532, section 4); all of them by default.

    group_size        the format of the weights
    kv_bits           bits of the KV cache that layers begin with; 16 leaves keys and values alone
    kv_average        layers are raised to 8 bits, the worst first, up to this mean; 0 raises only
                      those that 4 bits ruin
    rotate            norms folded and the residual stream rotated (4.3.1)
    rotate_values     each value head rotated against o
    smooth_attention  outlier channels of the keys moved into the queries (4.2)
    smooth_output     those of the inputs of o and down moved into their weights (4.3.2)
    reorder           input channels of o and down sorted by size (4.3.3); g128 only
    correct           weights fitted to inputs that were rounded, see layer_weights.corrected
    method, clip      the weight step, see WeightOptions
    seed              of the rotation; the choice of calibration text has the same
    """

    group_size: GroupSize = 128
    kv_bits: Literal[4, 8, 16] = 4
    kv_average: float = 4.5
    rotate: bool = True
    rotate_values: bool = True
    smooth_attention: bool = True
    smooth_output: bool = True
    reorder: bool = True
    correct: bool = True
    method: Literal["rtn", "gptq"] = "gptq"
    clip: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.kv_average == 0 or 4 <= self.kv_average <= 8):
            raise OptionError(f"kv_average={self.kv_average}: expected 0, or 4 to 8")
        if self.correct and self.method == "rtn":
            raise OptionError("correct=True needs method='gptq'")
        self.weights()

    def weights(self) -> WeightOptions:
        """The options of the weight step."""
        return WeightOptions(self.group_size, self.method, self.clip)


@dataclasses.dataclass
class LayerRecord:
    """What was chosen for one layer.

    strengths  "attention", "values" or the weight of a down -> its search, as `strength` has it
    reordered  weights of o and down whose inputs were sorted
    kv         bits, errors and reason, as `kv_entry` has it; None if it keeps no keys and values
    errors     packed weight -> relative mean squared output error on calibration text
    sqnr       of the layer's contribution to the stream, in dB, next to the exact layer on the same
               input; the correction, which makes up for errors of that input, counts as noise
    refused    what was left out, with the reason
    """

    name: str
    strengths: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    reordered: list[str] = dataclasses.field(default_factory=list)
    kv: dict[str, Any] | None = None
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    sqnr: float | None = None
    refused: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Record:
    """All of a calibration: its settings, its layers, what no layer could have, its cost."""

    recipe: Recipe
    samples: int
    seq: int
    layers: tuple[LayerRecord, ...]
    refused: tuple[str, ...]

    def kv_layers(self) -> tuple[Literal[4, 8, 16], ...]:
        """KV bits per layer; empty if every layer has recipe.kv_bits."""
        bits = [self.recipe.kv_bits if x.kv is None else x.kv["bits"] for x in self.layers]
        return () if set(bits) <= {self.recipe.kv_bits} else tuple(bits)

    def kv_mean(self) -> float:
        """The mean of the KV bits over the layers."""
        return sum(self.kv_layers()) / len(self.layers) if self.kv_layers() else self.recipe.kv_bits

    def trials(self) -> int:
        """Evaluations that the searches for alpha and beta took, over all layers."""
        found = (s["trials"] for layer in self.layers for s in layer.strengths.values())
        return int(sum(found))

    def entry(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**dataclasses.asdict(self), "kv_mean": self.kv_mean()}


def strength(search: Search, judged: float | None = None) -> dict[str, float]:
    """A search as the record holds it.

    gain    the error over that without smoothing, in the search
    judged  the same behind GPTQ; 1 or more: it was not applied, and alpha and beta are 0
    """
    plain, best = search.trials[0].error, search.best
    gain = best.error / plain if plain > 0 else 1.0
    kept = judged is None or judged < 1
    found: dict[str, float] = {
        "alpha": best.alpha if kept else 0.0,
        "beta": best.beta if kept else 0.0,
        "gain": gain,
        "trials": len(search.trials),
    }
    return found if judged is None else {**found, "judged": judged}


def kv_entry(choice: KVChoice) -> dict[str, Any]:
    """A choice of KV bits as the record holds it."""
    errors = {str(bits): error for bits, error in choice.errors.items()}
    return {"bits": choice.bits, "errors": errors, "reason": choice.reason}


def kv_choices(layers: Sequence[LayerRecord]) -> list[KVChoice]:
    """The choices that the layers' records hold; layers without are left out."""
    return [
        KVChoice(x.name, x.kv["bits"], _by_bits(x.kv["errors"]), x.kv["reason"])
        for x in layers
        if x.kv is not None
    ]


def _by_bits(errors: Mapping[str, float]) -> dict[int, float]:
    return {int(bits): error for bits, error in errors.items()}


def decibel(signal: float, noise: float) -> float:
    """The ratio in dB; 200 where there is no noise (JSON has no infinity)."""
    return min(10 * math.log10(signal / noise), 200.0) if signal > 0 and noise > 0 else 200.0
