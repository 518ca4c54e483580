"""The manifest of an artifact, qoqc/manifest.json: what is in the directory and how it was made."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import torch

from qoqc.artifact.folder import checksum
from qoqc.errors import ArtifactError
from qoqc.ir.spec import GROUP, OUTPUT_DTYPES, TILE_N
from qoqc.pipeline import Report
from qoqc.quant.pack import ceil_div
from qoqc.quant.weight import PackedWeight

FORMAT = 1
"""Version of the artifact format; a reader takes exactly its own."""

PATH = "qoqc/manifest.json"
WEIGHTS = "model.safetensors"
KERNELS = "qoqc/kernels"

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in OUTPUT_DTYPES}


@dataclasses.dataclass(frozen=True)
class WeightEntry:
    """A packed weight [out_features, in_features] of a Parameter, [K, N] if `transposed`."""

    out_features: int
    in_features: int
    group_size: Literal[128, -1]
    transposed: bool
    dtype: str

    @classmethod
    def of(cls, packed: PackedWeight, transposed: bool, dtype: torch.dtype) -> WeightEntry:
        """The entry that describes `packed`, standing for a Parameter of `dtype`."""
        name = str(dtype).removeprefix("torch.")
        n, k = packed.out_features, packed.in_features
        return cls(n, k, packed.group_size, transposed, name)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the Parameter."""
        n, k = self.out_features, self.in_features
        return (k, n) if self.transposed else (n, k)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the Parameter."""
        return _DTYPES[self.dtype]

    def expected(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each stored tensor, by its suffix; layouts in quant/weight.py."""
        n, tiles = self.out_features, ceil_div(self.in_features, GROUP)
        tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "qweight": ((ceil_div(n, TILE_N), tiles, TILE_N, GROUP // 2), torch.uint8),
            "channel_scale": ((n,), torch.float32),
        }
        if self.group_size == GROUP:
            tensors["group_word"] = ((tiles, n), torch.int32)
        else:
            tensors["channel_zero"] = ((n,), torch.int32)
        return tensors


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Everything about an artifact that is not a tensor.

    architecture  class name in transformers
    versions      of qoqc, torch, transformers, triton at the time of making
    options       the options of qoqc.config.Options that shape the result
    weights       packed weights by Parameter name
    tensors       names of the tensors stored as they are
    aliases       names that stand for another name's tensor (tied weights)
    graphs        per captured graph: name, counts, refusals
    bytes_before  size of all parameters in the model that was compiled
    bytes_after   size of the stored tensors
    files         SHA-256 of every other file, by path
    recipe        how a calibration went, see calibrate.recipe.Record; None: rounded to nearest
    gate          perplexity and KL next to the 16-bit model, on which text; None: not judged
    """

    architecture: str
    versions: dict[str, str]
    options: dict[str, Any]
    weights: dict[str, WeightEntry]
    tensors: list[str]
    aliases: dict[str, str]
    graphs: list[dict[str, Any]]
    bytes_before: int
    bytes_after: int
    files: dict[str, str]
    recipe: dict[str, Any] | None = None
    gate: dict[str, Any] | None = None

    def write(self, directory: Path) -> None:
        """Write it below `directory`, with a digest of itself."""
        body = {"format": FORMAT, **dataclasses.asdict(self)}
        path = directory / PATH
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"digest": _digest(body), **body}, indent=1) + "\n")

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read it from `directory`, which it does not look at otherwise.

        Raises ArtifactError if it is missing, damaged or of another format version.
        """
        path = directory / PATH
        if not directory.is_dir():
            raise ArtifactError(f"{directory} is not a directory")
        try:
            body = json.loads(path.read_text())
            version = body.pop("format")
            if version != FORMAT:
                raise ArtifactError(
                    f"{directory} has artifact format {version!r}, this qoqc reads {FORMAT}; "
                    "compile the model again"
                )
            if body.pop("digest") != _digest({"format": version, **body}):
                raise ArtifactError(f"{path} is damaged: its digest does not fit its contents")
            weights = {name: WeightEntry(**entry) for name, entry in body.pop("weights").items()}
            return cls(weights=weights, **body)
        except FileNotFoundError:
            raise ArtifactError(f"{directory} is no artifact: it has no {PATH}") from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ArtifactError(f"{path} is damaged: {error}") from error

    def verify(self, directory: Path) -> None:
        """Raise ArtifactError unless every file is there with the checksum it was written with."""
        for name, expected in self.files.items():
            path = directory / name
            if not path.is_file():
                raise ArtifactError(f"{directory}: {name} is missing; compile the model again")
            if checksum(path) != expected:
                raise ArtifactError(
                    f"{directory}: {name} is damaged (its SHA-256 is not the recorded one); "
                    "compile the model again"
                )


def graph_entry(report: Report) -> dict[str, Any]:
    """A graph's report as plain JSON values; no seconds: the same model gives the same bytes."""
    return {
        "graph": report.graph,
        "counts": report.counts,
        "refusals": [dataclasses.asdict(refusal) for refusal in report.refusals],
    }


def is_artifact(directory: Path) -> bool:
    """Whether `directory` claims to be an artifact (it may be a damaged one)."""
    return (directory / PATH).is_file()


def _digest(body: dict[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
