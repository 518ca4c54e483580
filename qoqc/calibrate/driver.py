"""QoQ on a live model. Read `calibrate` first: it is the algorithm, a step per line."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qoqc.calibrate.attention_step import attention_step
from qoqc.calibrate.blocks import Blocks, rounded_act
from qoqc.calibrate.checkpoint import Checkpoints, Finished
from qoqc.calibrate.kv_bits import spend_bits
from qoqc.calibrate.layer_weights import weights_step
from qoqc.calibrate.linear_step import down_step, reorder_step
from qoqc.calibrate.names import block_names, layers_by_block, structure_for
from qoqc.calibrate.outcome import Outcome, stored
from qoqc.calibrate.recipe import (
    LayerRecord,
    Recipe,
    Record,
    decibel,
    kv_choices,
    kv_entry,
)
from qoqc.calibrate.source import Source
from qoqc.calibrate.work import LayerWork
from qoqc.errors import Unsupported
from qoqc.log import get_logger
from qoqc.passes.structure.discover import structure_of
from qoqc.passes.structure.facts import ModelStructure
from qoqc.runtime.weights import WeightRef

log = get_logger("calibrate")

SEARCH_TOKENS = 4096
"""Tokens on which alpha, beta, orders and KV bits are judged; weights see all of the text."""

Progress = Callable[[int, int], None]
"""Called with (layers done, layers in all)."""


@torch.no_grad()
def calibrate(
    model: Any,
    windows: Tensor,
    weights: Sequence[WeightRef],
    recipe: Recipe,
    *,
    device: torch.device | str | None = None,
    checkpoints: Checkpoints | None = None,
    progress: Progress | None = None,
) -> Record:
    """Run the recipe on a Hugging Face decoder, in place.

    windows  calibration text, int64 [W, S], no padding
    weights  those the product packs (artifact.survey knows)
    device   does the work, one block in fp32 at a time; None: where the model is. The model stays
             where it is, on the CPU, say, if it is larger than a GPU's memory

    Afterwards STORE holds the packed weights, and the model's parameters their 16-bit values and
    the folds. The same arguments give the same bits. Raises Unsupported for models that are no
    chain of blocks, and, naming the layer, for NaN or infinity; the model is unchanged then.
    """
    where: torch.device = model.device if device is None else torch.device(device)
    structure = structure_of(model)
    names = block_names(model, structure)
    source = Source(model, structure, names, recipe, where)
    structure = source.structure
    blocks = Blocks(model, names, windows, where)
    hidden = blocks.embed(source.outside(head=False), windows, _home(windows, structure, where))
    exact = list(hidden)  # what the 16-bit model would hand on, for the correction
    refs = {ref.name: ref for ref in weights}
    transposed = {ref.name: ref.transposed for ref in weights}
    outcome = Outcome(model, refs)
    records: list[LayerRecord] = []
    for index, layer in enumerate(layers_by_block(names, structure)):
        start = time.perf_counter()
        name = names[index]
        record = LayerRecord(name)
        own = [ref.name for ref in weights if ref.name.startswith(f"{name}.")]
        search = hidden[: max(1, SEARCH_TOKENS // windows.shape[1])]
        tensors = source.block(name)
        # the steps change them in place; a layer read from disk needs them as they were, too
        original = {known: t.clone() for known, t in tensors.items()} if recipe.correct else {}
        work = LayerWork(
            blocks, index, layer, structure_for(structure, layer), tensors, own, search, recipe,
            record,
        )  # fmt: skip
        finished = checkpoints.load(index, where) if checkpoints is not None else None
        if finished is None:
            finished = _calibrate_layer(work, transposed, hidden, exact)
            if checkpoints is not None:
                checkpoints.save(index, finished)
        _install(work, finished, transposed)
        records.append(finished.record)
        _propagate(work, hidden, finished.record)
        if recipe.correct:
            blocks.recorder.bits = 16
            for number, x in enumerate(exact):
                exact[number] = blocks.run(index, original, x).to(x.device)
        outcome.keep(finished)
        log.info("%s: %.1f s", finished.record, time.perf_counter() - start)
        if progress is not None:
            progress(index + 1, len(names))
    _spend(records, recipe)
    outcome.hand_over(source.outside())
    return Record(recipe, len(windows), windows.shape[1], tuple(records), tuple(source.refused))


def _home(windows: Tensor, structure: ModelStructure, device: torch.device) -> torch.device:
    """Where hidden states wait for their turn: on a GPU if that leaves most of it free.

    Each is read about ten times per layer, and copies from and to the CPU take longer than what
    is computed of it.
    """
    if device.type != "cuda":
        return torch.device("cpu")
    free, _ = torch.cuda.mem_get_info(device)
    both = 2 * 4 * windows.numel() * structure.stream.width  # quantized and exact, in fp32
    return device if both <= free / 4 else torch.device("cpu")


def _calibrate_layer(
    work: LayerWork,
    transposed: Mapping[str, bool],
    hidden: Sequence[Tensor],
    exact: Sequence[Tensor],
) -> Finished:
    """All steps on one layer, in the paper's order."""
    attention_step(work)
    down_step(work)
    reorder_step(work)
    expected = _outputs(work, bits=16, rounded=())
    packed = weights_step(work, transposed, hidden, exact, _bits(work.recipe, work.record))
    found = _outputs(work, _bits(work.recipe, work.record), tuple(packed))
    signal = noise = 0.0
    for x, y, z in zip(work.inputs, expected, found, strict=True):
        signal += float((y - x.to(y.device)).double().square().sum())
        noise += float((z - y).double().square().sum())
    work.record.sqnr = decibel(signal, noise)
    others = {name: tensor for name, tensor in work.tensors.items() if name not in packed}
    return Finished(packed, others, work.record)


def _install(work: LayerWork, finished: Finished, transposed: Mapping[str, bool]) -> None:
    """The tensors of a finished layer, whether just made or read."""
    work.tensors.update(finished.others)
    for name, weight in finished.packed.items():
        work.tensors[name] = stored(weight, transposed[name])


def _outputs(work: LayerWork, bits: int, rounded: Sequence[str]) -> list[Tensor]:
    """The layer's outputs for the search windows."""
    work.blocks.recorder.bits = bits
    with work.blocks.watching(dict.fromkeys(rounded, rounded_act)):
        return [work.blocks.run(work.index, work.tensors, x) for x in work.inputs]


def _propagate(work: LayerWork, hidden: list[Tensor], record: LayerRecord) -> None:
    """The quantized layer's outputs, in the place of its inputs: one set of activations at most."""
    work.blocks.recorder.bits = _bits(work.recipe, record)
    with work.blocks.watching(dict.fromkeys(work.packed, rounded_act)):
        for number, x in enumerate(hidden):
            hidden[number] = work.blocks.run(work.index, work.tensors, x).to(x.device)
            if not torch.isfinite(hidden[number]).all():
                raise Unsupported(
                    f"{record.name}: its output on the calibration text holds NaN or infinity; "
                    "check the model in 16 bit on this text"
                )


def _bits(recipe: Recipe, record: LayerRecord) -> int:
    return recipe.kv_bits if record.kv is None else int(record.kv["bits"])


def _spend(records: Sequence[LayerRecord], recipe: Recipe) -> None:
    """Raise KV bits within the average, now that the errors of all layers are known."""
    choices = kv_choices(records)
    if not recipe.kv_average or recipe.kv_bits != 4 or len(choices) != len(records):
        return
    for record, choice in zip(records, spend_bits(choices, recipe.kv_average), strict=True):
        record.kv = kv_entry(choice)
