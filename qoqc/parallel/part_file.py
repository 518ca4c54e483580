"""Reading a rank's part of an artifact, and no more than that."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping
from pathlib import Path

import torch

from qoqc.artifact.manifest import Manifest, WeightEntry, stored_name
from qoqc.artifact.packed_file import PackedFile
from qoqc.errors import ArtifactError
from qoqc.parallel.cut import Cut, Index, part
from qoqc.parallel.ranks import Ranks
from qoqc.quant.weight import PackedWeight


class PartFile(PackedFile):
    """A PackedFile whose weights, once `narrow` is called, are this rank's parts of them.

    Ranks share the checking of the files: each reads about its share of the bytes to hash them.

    bytes_read  of the tensors read so far
    """

    def __init__(self, directory: Path, ranks: Ranks) -> None:
        """Read the manifest; the tensors are opened on entry."""
        try:
            super().__init__(directory, ranks.device)
        except ArtifactError as error:
            ranks.agree(str(error), ArtifactError)  # the others wait there, in __enter__
            raise
        self._whole = self.manifest
        self._ranks = ranks
        self._cuts: Mapping[str, Cut] = {}
        self.bytes_read = 0
        self._counting = threading.Lock()

    def __enter__(self) -> PartFile:
        """Verify the files, together with the other ranks, and open those with tensors."""
        problem = None
        manifest = self.manifest
        try:
            mine, others = _shared_out(manifest, self._ranks)
            others.verify(self.directory, "lazy")
            self.manifest = mine
            super().__enter__()
            # before the ranks part: one that found damage later could not tell the others, who
            # wait for it in the model's first sum
            self._hashes.require_sound()
        except ArtifactError as error:
            problem = str(error)
        self.manifest = manifest
        try:
            self._ranks.agree(problem, ArtifactError)
        except ArtifactError:
            self._open.close()
            raise
        return self

    def narrow(self, cuts: Mapping[str, Cut]) -> None:
        """From now on be an artifact of parts: `cuts` by the path of a linear's module."""
        self._cuts = cuts
        weights = dict(self._whole.weights)
        for path, cut in cuts.items():
            entry = weights.get(f"{path}.weight")
            if entry is not None:
                n, k = cut.shape(entry.out_features, entry.in_features)
                weights[f"{path}.weight"] = dataclasses.replace(
                    entry, out_features=n, in_features=k
                )
        self.manifest = dataclasses.replace(self._whole, weights=weights)

    def _read_tensor(self, name: str) -> torch.Tensor:
        """The rank's part of a tensor that is stored as it is."""
        path, _, leaf = name.rpartition(".")
        cut = self._cuts.get(path)
        if cut is None or leaf not in ("weight", "bias"):
            return self._counted(super()._read_tensor(name))
        if leaf == "weight":
            return self._slice(name, cut.index)
        return self._counted(cut.of_bias(super()._read_tensor(name)))

    def _read_packed(self, name: str) -> PackedWeight:
        """The rank's part of the packed weight of a Parameter; checked as whole ones are."""
        cut = self._cuts.get(name.removesuffix(".weight"))
        if cut is None:
            return super()._read_packed(name)
        entry = self._whole.weights[name]
        expected = entry.expected()
        for field, (shape, _) in expected.items():
            stored = stored_name(name, field)
            found = self._place(stored).shape(stored)
            if found != shape:
                raise ArtifactError(
                    f"{self.directory}: {stored} has shape {list(found)}, expected {list(shape)}"
                )

        def read(field: str, index: Index) -> torch.Tensor:
            return self._slice(stored_name(name, field), index)

        packed = part(read, entry.out_features, entry.in_features, _is_grouped(entry), cut)
        for field, tensor in packed.tensors().items():
            if tensor.dtype != expected[field][1]:
                raise ArtifactError(
                    f"{self.directory}: {stored_name(name, field)} is {tensor.dtype}, expected "
                    f"{expected[field][1]}"
                )
        if not torch.isfinite(packed.channel_scale).all():
            raise ArtifactError(
                f"{self.directory}: {stored_name(name, 'channel_scale')} is not finite"
            )
        return packed

    def _slice(self, stored: str, index: Index) -> torch.Tensor:
        if not index:
            return self._counted(super()._read_tensor(stored))
        return self._counted(self._place(stored).part(stored, index, self.device))

    def _counted(self, tensor: torch.Tensor) -> torch.Tensor:
        with self._counting:
            self.bytes_read += tensor.numel() * tensor.element_size()
        return tensor


def _is_grouped(entry: WeightEntry) -> bool:
    return entry.group_size != -1


def _shared_out(manifest: Manifest, ranks: Ranks) -> tuple[Manifest, Manifest]:
    """The manifest with the weight files this rank hashes, and with those that others do."""
    names = sorted(manifest.shards, key=lambda name: (-manifest.shards[name].size, name))
    others = {name for i, name in enumerate(names) if i % ranks.size != ranks.rank}
    files = manifest.files.items()
    return (
        dataclasses.replace(manifest, files={k: v for k, v in files if k not in others}),
        dataclasses.replace(manifest, files={k: v for k, v in files if k in others}),
    )
