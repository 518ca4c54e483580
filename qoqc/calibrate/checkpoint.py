"""Finished layers on disk, so that a calibration that was killed goes on where it was."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qoqc.calibrate.recipe import LayerRecord, Recipe
from qoqc.errors import QoqcError
from qoqc.log import get_logger
from qoqc.quant.weight import PackedWeight

log = get_logger("calibrate")


@dataclasses.dataclass(frozen=True)
class Finished:
    """A layer that is done: its packed weights, its other tensors, its record."""

    packed: dict[str, PackedWeight]
    others: dict[str, Tensor]
    record: LayerRecord


class Checkpoints:
    """A directory with a file per finished layer, all made from the inputs that `key` stands for.

    A file that is damaged, or was made from other inputs, is as good as none: its layer is done
    again, and the file replaced.
    """

    def __init__(self, directory: Path, key: str) -> None:
        """Use `directory`, which exists."""
        self._directory = directory
        self._key = key

    def load(self, index: int, device: torch.device) -> Finished | None:
        """Layer `index`, if its file is there and fits."""
        path = self._path(index)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                meta = file.metadata()
                if meta["key"] != self._key:
                    log.warning("%s was made from other inputs; the layer is done again", path)
                    return None
                # clones: what safetensors maps is aligned differently from an allocation
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            sizes = json.loads(meta["sizes"])
            packed = {n: _packed(tensors, n, *size) for n, size in sizes.items()}
            record = LayerRecord(**json.loads(meta["record"]))
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            log.warning("%s is damaged (%s); the layer is done again", path, error)
            return None
        return Finished(packed, tensors, record)

    def save(self, index: int, finished: Finished) -> None:
        """Write layer `index`; the file appears whole or not at all."""
        tensors = {name: t.contiguous() for name, t in finished.others.items()}
        for name, weight in finished.packed.items():
            tensors.update({f"{name}:{k}": t.contiguous() for k, t in weight.tensors().items()})
        sizes = {n: (w.out_features, w.in_features) for n, w in finished.packed.items()}
        record = json.dumps(dataclasses.asdict(finished.record))
        meta = {"key": self._key, "sizes": json.dumps(sizes), "record": record}
        path = self._path(index)
        draft = path.with_suffix(".draft")
        save_file(tensors, draft, metadata=meta)
        os.replace(draft, path)

    def _path(self, index: int) -> Path:
        return self._directory / f"layer-{index:04d}.safetensors"


def _packed(tensors: dict[str, Tensor], name: str, n: int, k: int) -> PackedWeight:
    """Take the parts of one packed weight out of `tensors`."""
    group, zero = (tensors.pop(f"{name}:{part}", None) for part in ("group_word", "channel_zero"))
    parts = tensors.pop(f"{name}:qweight"), tensors.pop(f"{name}:channel_scale")
    return PackedWeight(*parts, group, zero, n, k)


@contextmanager
def partial_directory(target: Path) -> Iterator[Path]:
    """`TARGET.partial`, made at once, so that an output that cannot be written is known early.

    Gone when the block ends well or with an error of qoqc's own, which would come again; left
    for the next run by anything else: Ctrl-C, a kill, no memory.
    """
    directory = target.with_name(f"{target.name}.partial")
    directory.mkdir(parents=True, exist_ok=True)
    try:
        yield directory
    except QoqcError:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    shutil.rmtree(directory, ignore_errors=True)


def key_of(
    model: Any, windows: Tensor, recipe: Recipe, weights: Sequence[str], versions: Mapping[str, str]
) -> str:
    """A digest of everything the outcome depends on."""
    facts = [dataclasses.asdict(recipe), list(windows.shape), sorted(weights), dict(versions)]
    digest = hashlib.sha256(
        json.dumps([facts, model.config.to_dict()], sort_keys=True, default=str).encode()
    )
    tensors = sorted([*model.state_dict().items(), ("windows", windows)])
    # hashing lets other threads run, and a large model takes one thread half a minute
    with ThreadPoolExecutor() as pool:
        for (name, tensor), found in zip(tensors, pool.map(_sha256, tensors), strict=True):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} {found}".encode())
    return digest.hexdigest()


def _sha256(item: tuple[str, Tensor]) -> str:
    """Of the tensor's bytes."""
    raw = item[1].detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(raw.numpy().data).hexdigest()
