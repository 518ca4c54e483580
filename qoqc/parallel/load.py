"""A rank's model: of an artifact, of which it reads its part, or of a model in memory."""

from __future__ import annotations

import dataclasses
import os
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.nn import Linear, Parameter

from qoqc.artifact.huggingface import attach, made_with
from qoqc.artifact.load import build, fill
from qoqc.config import Options
from qoqc.errors import Unsupported
from qoqc.log import get_logger
from qoqc.parallel.collectives import connect
from qoqc.parallel.cut import Cut
from qoqc.parallel.part_file import PartFile
from qoqc.parallel.plan import cuts
from qoqc.parallel.ranks import Ranks

log = get_logger("parallel")


@dataclasses.dataclass(frozen=True)
class Membership:
    """What a split model knows of itself, as `model.qoqc_parallel`.

    head         the path of the output head, if it is split
    bytes_read   of an artifact's tensors, by this rank
    bytes_total  of all of them
    """

    ranks: Ranks
    cuts: Mapping[str, Cut]
    head: str | None
    bytes_read: int = 0
    bytes_total: int = 0

    def exclude(self, lm_head: str) -> tuple[str, ...]:
        """Linears that must stay in 16 bit, under that option for the output head.

        The passes know a head by its rows, and part of one looks like any other linear. Raises
        Unsupported if it is to be quantized.
        """
        if self.head is None:
            return ()
        if lm_head != "16":
            raise Unsupported(
                f"lm_head={lm_head!r}: {self.head} is split among ranks already, and parts of a "
                "head stay in 16 bit; load an artifact with that option, which leaves it whole"
            )
        return (self.head,)


def load_model(
    directory: str | os.PathLike[str],
    ranks: Ranks,
    *,
    exact: bool = False,
    lm_head: str | None = None,
) -> tuple[Any, Options]:
    """This rank's part of an artifact's model, ready for qoqc.compile, and the options it has.

    exact    the integers that one rank would sum (Cut.exact), and their sum in fp32
    lm_head  the option of that name it will be compiled with, if not the artifact's: the output
             head is split if it stays in 16 bit

    All ranks call it, and later `forward` and `generate`, alike. Raises ArtifactError as
    qoqc.artifact.load does, on all ranks if one finds a damaged file; Unsupported for a model that
    cannot be split among so many.
    """
    with PartFile(Path(directory), ranks) as file:
        options = made_with(file.manifest)
        model = build(file)
        parts = cuts(model, ranks)
        head = _head(model, parts)
        if head is not None and (lm_head or options.lm_head) != "16":
            del parts[head]  # the passes know a head by its rows
            head = None
        if exact:
            packed = {path for path in parts if f"{path}.weight" in file.manifest.weights}
            parts = {path: _exact(cut) if path in packed else cut for path, cut in parts.items()}
        _shrink(model, parts)
        file.narrow(parts)
        fill(model, file)
    attach(model, file.manifest, file.directory)
    total = file.manifest.bytes_after
    log.info("rank %d of %d read %d of %d bytes", ranks.rank, ranks.size, file.bytes_read, total)
    _join(model, Membership(ranks, parts, head, file.bytes_read, total))
    return model.eval().requires_grad_(False), options


def split(model: Any, ranks: Ranks) -> Any:
    """Reduce a transformers model in 16 bit, or on the meta device, to this rank's part, in place.

    For qoqc.compile, which packs the part. Returns the same model. Raises Unsupported for one that
    cannot be split among so many.
    """
    parts = cuts(model, ranks)
    _shrink(model, parts)
    _join(model, Membership(ranks, parts, _head(model, parts)))
    return model


def _head(model: Any, parts: Mapping[str, Cut]) -> str | None:
    """The path of the output head, if it is split."""
    head = model.get_output_embeddings()
    return next((path for path in parts if model.get_submodule(path) is head), None)


def _exact(cut: Cut) -> Cut:
    return dataclasses.replace(cut, exact=cut.axis == "columns")


def _shrink(model: Any, parts: Mapping[str, Cut]) -> None:
    for path, cut in parts.items():
        module = model.get_submodule(path)
        assert isinstance(module, Linear), "the plan holds nothing else"
        module.weight = _parameter(cut.of_weight(module.weight.detach()))
        module.out_features, module.in_features = module.weight.shape
        if module.bias is not None:
            module.bias = _parameter(cut.of_bias(module.bias.detach()))


def _parameter(value: Any) -> Parameter:
    return Parameter(value, requires_grad=False)


def _join(model: Any, membership: Membership) -> None:
    """Make the model one of several: it exchanges sums, and does not pass for a whole one."""
    model.qoqc_parallel = membership
    if membership.ranks.size == 1:
        return
    connect(model, membership.cuts, membership.ranks)
    model.generate = types.MethodType(_generate, model)
    model.save_pretrained = types.MethodType(_refuse_saving, model)
    model.push_to_hub = types.MethodType(_refuse_saving, model)


def _generate(self: Any, *args: Any, **kwargs: Any) -> Any:
    """GenerationMixin.generate, but for what ends it by each rank's own clock."""
    config = kwargs.get("generation_config") or self.generation_config
    if kwargs.get("max_time", config.max_time) is not None:
        raise Unsupported(
            "max_time: each rank has a clock of its own, and one that stops alone leaves the "
            "others waiting; use max_new_tokens"
        )
    return type(self).generate(self, *args, **kwargs)


def _refuse_saving(self: Any, *args: Any, **kwargs: Any) -> None:
    rank, size = self.qoqc_parallel.ranks.rank, self.qoqc_parallel.ranks.size
    raise Unsupported(
        f"this model is part {rank} of {size} and makes no whole artifact; load it with qoqc.load "
        "without tp, and save that"
    )
