"""The manifest of an artifact, qoqc/manifest.json: what is in the directory and how it was made."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from qoqc.artifact.checked import (
    Shard,
    ShardHashes,
    begin_verify,
    require_plain_names,
    verify_files,
)
from qoqc.config import Options, Verify
from qoqc.errors import ArtifactError
from qoqc.ir.spec import GROUP, OUTPUT_DTYPES, TILE_N
from qoqc.quant.pack import ceil_div
from qoqc.quant.weight import PackedWeight

if TYPE_CHECKING:  # the compiler is more than a reader of manifests should import
    from qoqc.pipeline import Report

FORMAT = 2
"""Version of the artifact format; a reader takes exactly its own. 1: one file of weights, packed
ones under the Parameter's whole name, no quantization_config: compile such a model again."""

PATH = "qoqc/manifest.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
KERNELS = "qoqc/kernels"
TUNING = "qoqc/tuning"
GRAPHS = "qoqc/graphs"
ASIDE = (KERNELS, TUNING, GRAPHS)
"""Folders that loading needs nothing of: a file may be missing, and must be sound if it is not."""

CARD = "README.md"
CONFIG = "config.json"
GENERATION = "generation_config.json"

MAX_BYTES = 64 << 20
"""Of a manifest: a thousand times that of a model of 200 linears."""

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

    @classmethod
    def read(cls, name: str, raw: Mapping[str, Any]) -> WeightEntry:
        """The entry in a manifest; ValueError if it is not one."""
        entry = cls(**raw)
        sizes = (entry.out_features, entry.in_features)
        if (
            not all(type(size) is int and 0 < size < 2**31 for size in sizes)
            or entry.group_size not in (GROUP, -1)
            or type(entry.transposed) is not bool
            or entry.dtype not in _DTYPES
        ):
            raise ValueError(f"{name}: {entry} is not a packed weight")
        return entry

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
    shards        the weight files by name, each with what tells it from another cheaply
    base_model    what was compiled, as the user named it
    kernels       the generated kernels: file, op, form, spec, size, tile, device
    graphs        per captured graph: name, counts, refusals, the file it is written out in, and of
                  the first of a decode step the kernels it launches, by layer
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
    shards: dict[str, Shard]
    base_model: str | None = None
    kernels: list[dict[str, Any]] = dataclasses.field(default_factory=list)
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

        Raises ArtifactError if it is missing, damaged, of another format version, or names files
        outside the directory.
        """
        path = directory / PATH
        if not directory.is_dir():
            raise ArtifactError(f"{directory} is not a directory")
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
                raise ValueError(f"it is no file of at most {MAX_BYTES} bytes")
            body = json.loads(path.read_bytes())
            version = body.pop("format")
            if version != FORMAT:
                raise ArtifactError(
                    f"{directory} has artifact format {version!r}, this qoqc reads {FORMAT}; "
                    "compile the model again"
                )
            if body.pop("digest") != _digest({"format": version, **body}):
                raise ArtifactError(f"{path} is damaged: its digest does not fit its contents")
            return cls._of(body)
        except FileNotFoundError:
            raise ArtifactError(f"{directory} is no artifact: it has no {PATH}") from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ArtifactError(f"{path} is damaged: {error!r:.200}") from error

    def verify(self, directory: Path, mode: Verify = "full") -> int:
        """Compare the files with their checksums; returns how many.

        The card is for people to edit and is left out. Generated kernels and tuning entries may
        be missing, they are made again; in a cache of the Hub, which holds what was asked for,
        all but the config and the weights may.
        Raises ArtifactError, naming the first file that is missing or damaged.
        """
        files, optional = self._to_compare(directory)
        return verify_files(directory, files, self.shards, mode, optional=optional)

    def begin_verify(self, directory: Path, mode: Verify = "full") -> ShardHashes:
        """`verify`, but for the values of the weight files, which are compared meanwhile."""
        files, optional = self._to_compare(directory)
        return begin_verify(directory, files, self.shards, mode, optional=optional)

    def _to_compare(self, directory: Path) -> tuple[dict[str, str], set[str]]:
        """Files with their checksums, and the names of those that may be missing."""
        files = {name: digest for name, digest in self.files.items() if name != CARD}
        if directory.parent.name == "snapshots":
            return files, files.keys() - {CONFIG, *self.shards}
        return files, {name for name in files if name.startswith(ASIDE)}

    def tuning_tables(self, directory: Path) -> list[Path]:
        """The files with tuning entries; one made again or not asked of the Hub may be missing."""
        return [directory / name for name in sorted(self.files) if name.startswith(f"{TUNING}/")]

    def listings(self, directory: Path) -> list[Path]:
        """The files with graphs written out that are there, in the order of the graphs."""
        named = [str(graph.get("file")) for graph in self.graphs]
        return [
            directory / name
            for name in named
            if name in self.files and (directory / name).is_file()
        ]

    @classmethod
    def _of(cls, body: dict[str, Any]) -> Manifest:
        """From its JSON. A digest tells damage only: whoever edits a manifest can renew it."""
        for name in ("versions", "aliases", "files"):
            texts = [*body[name], *body[name].values()]
            if not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{name} is not an object of strings")
        if not all(isinstance(name, str) for name in [body["architecture"], *body["tensors"]]):
            raise ValueError("architecture or tensors are not strings")
        if not {"group_size", "kv_bits", "kv_layers"} <= body["options"].keys():
            raise ValueError("options lack group_size, kv_bits or kv_layers")
        Options.parse(body["options"])
        for name, kind in (("graphs", list), ("kernels", list), ("recipe", dict), ("gate", dict)):
            if not (isinstance(body[name], kind) or (kind is dict and body[name] is None)):
                raise ValueError(f"{name} is not a {kind.__name__}")
        for graph in body["graphs"]:
            _check_graph(graph)
        if not all(type(body[name]) is int for name in ("bytes_before", "bytes_after")):
            raise ValueError("sizes are not integers")
        weights = {name: WeightEntry.read(name, raw) for name, raw in body.pop("weights").items()}
        shards = {name: Shard.read(raw) for name, raw in body.pop("shards").items()}
        require_plain_names([*body["files"], *shards])
        if not shards.keys() <= body["files"].keys():
            raise ValueError("a weight file has no checksum")
        return cls(weights=weights, shards=shards, **body)


def _check_graph(graph: dict[str, Any]) -> None:
    """ValueError or the like if an entry of `graphs` cannot be shown."""
    kinds = {"graph": str, "counts": dict, "refusals": list}
    launches = graph.get("launches")
    sound = all(isinstance(graph[name], kind) for name, kind in kinds.items())
    sound &= all({"name", "reason", "kept"} <= refusal.keys() for refusal in graph["refusals"])
    if launches is not None:
        sound &= isinstance(launches["device"], str) and isinstance(launches["layers"], list)
    if not sound:
        raise ValueError("an entry of graphs is not one")


def graph_entry(report: Report) -> dict[str, Any]:
    """A graph's report as plain JSON values; no seconds: the same model gives the same bytes."""
    return {
        "graph": report.graph,
        "counts": report.counts,
        "refusals": [dataclasses.asdict(refusal) for refusal in report.refusals],
    }


def quantization_config(options: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says about an artifact made with `options`: enough to recognize it."""
    return {
        "quant_method": "qoq",
        "format": FORMAT,
        "bits": 4,
        "group_size": options["group_size"],
        "activation_bits": 8,
        "kv_bits": options["kv_bits"],
        "kv_layers": list(options["kv_layers"]),
    }


def stored_name(name: str, field: str) -> str:
    """The name in the weight files of a tensor of a packed weight, given its Parameter's."""
    return f"{name.removesuffix('.weight')}.{field}"


def is_artifact(directory: Path) -> bool:
    """Whether `directory` claims to be an artifact (it may be a damaged one)."""
    return (directory / PATH).is_file()


def _digest(body: dict[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
