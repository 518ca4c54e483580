"""Calls of a loaded model: by a record if there is one that fits, else by Dynamo, and recorded."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.modeling_outputs import CausalLMOutputWithPast

from qoqc.codegen import dispatch
from qoqc.config import Options
from qoqc.log import get_logger
from qoqc.pipeline import Made, watched
from qoqc.records import files
from qoqc.records.capture import arguments, record_of
from qoqc.records.expressions import resolve
from qoqc.records.files import Record, Weight
from qoqc.records.identity import Identity, of_call, of_model
from qoqc.runtime.compile_cache import activate
from qoqc.runtime.compile_count import graph_from_cache
from qoqc.runtime.dynamo import code_of, count_cached_graph, load_code
from qoqc.runtime.executable import Executable, Slot
from qoqc.runtime.weights import STORE, Bundle, WeightRef

log = get_logger("records")

FOLDER = "records"
ELSEWHERE = ("dump", "require_cached", "artifact")
"""Options that change no graph."""

MAX_KNOWN = 64
"""Kinds of calls remembered per model; a model that changes with every call is traced as ever."""


@dataclasses.dataclass
class _Replay:
    record: Record
    run: Executable


class Records:
    """The recorded calls of one model, which an artifact of digest `artifact` was loaded as."""

    def __init__(self, model: Any, options: Options, artifact: str) -> None:
        """`model` is compiled; from then on its calls go through `call`."""
        kept = {k: v for k, v in dataclasses.asdict(options).items() if k not in ELSEWHERE}
        self._origin = repr((sorted(kept.items()), artifact, transformers.__version__))
        self._options = options
        self._compiled = model._compiled_call_impl
        self._known: dict[Identity, _Replay | None] = {}

    def call(self, model: Any, through_dynamo: Callable[[], Any], kwargs: dict[str, Any]) -> Any:
        """What model(**kwargs) gives: without Dynamo, or with it, and recorded for the next time.

        through_dynamo  makes that call; for those that no record is made of, and has been made of
        """
        identity = self._identity(model, kwargs)
        if identity is None:
            return through_dynamo()
        if identity not in self._known:
            if len(self._known) == MAX_KNOWN:
                return through_dynamo()
            self._known[identity] = self._read(model, identity, kwargs)
            if self._known[identity] is None:
                return self._recorded(model, identity, through_dynamo, kwargs)
        replay = self._known[identity]
        if replay is None:
            return through_dynamo()
        roots = {"self": model, "kwargs": kwargs}
        try:
            inputs = arguments(replay.record, roots)
            params = _parameters(replay.record, roots)
        except ValueError as error:
            log.info("a recorded graph is not for this call: %s", error)
            return through_dynamo()
        (logits,) = replay.run(*inputs, *params)
        cache = kwargs["past_key_values"]
        for layer in cache.layers:
            layer.empty = False
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    def _identity(self, model: Any, kwargs: Mapping[str, Any]) -> Identity | None:
        if model._compiled_call_impl is not self._compiled:
            return None
        structure, call = of_model(model), of_call(model, kwargs)
        return None if structure is None or call is None else (structure, call)

    def _key(self, identity: Identity) -> str:
        return hashlib.sha256(f"{self._origin}\n{identity!r}".encode()).hexdigest()[:32]

    def _folder(self, model: Any) -> Path | None:
        folder = activate(model.device)
        return None if folder is None else folder / FOLDER

    def _read(self, model: Any, identity: Identity, kwargs: dict[str, Any]) -> _Replay | None:
        folder, key = self._folder(model), self._key(identity)
        if folder is None:
            return None
        roots = {"self": model, "kwargs": kwargs}
        try:
            found = files.read(folder, key)
            if found is None:
                return None
            record, code = found
            if any(STORE.is_released(each) for each in _tensors(arguments(record, roots))):
                raise ValueError("it reads weights in 16 bit that were released")
            with graph_from_cache(f"record {key}", required=self._options.require_cached):
                run = load_code(code)
                replay = _Replay(record, self._executable(record, run, roots))
                count_cached_graph()
        except (ValueError, OSError) as error:
            log.warning("record %s is not used, the model is traced: %s", key, error)
            return None
        if model.device.type == "cuda":
            dispatch.install(self._options.tune, self._options.dump)
        log.info("record %s: %d inputs", key, len(record.inputs))
        return replay

    def _executable(
        self, record: Record, run: Callable[..., Any], roots: dict[str, Any]
    ) -> Executable:
        bound: list[torch.Tensor | None] = [None] * len(record.bound)
        slots, position = [], len(record.inputs)
        for weight in record.weights:
            bundle = _bundle(weight, roots)
            for index, field in weight.fields:
                # an expanded weight is made when it is first asked for
                bound[index] = bundle.int8() if field == "int8" else bundle.tensors()[field]
            positions = tuple(range(position, position + len(weight.sources)))
            slots.append(Slot(bundle, positions, dict(weight.fields)))
            position += len(weight.sources)
        tensors = [tensor for tensor in bound if tensor is not None]
        kinds = [[str(tensor.dtype), list(tensor.shape)] for tensor in tensors]
        if kinds != [list(each) for each in record.bound]:
            raise ValueError("its packed weights are others")
        for slot, weight in zip(slots, record.weights, strict=True):
            if self._options.release:
                STORE.release(slot.bundle, [resolve(each, roots) for each in weight.sources])
        release = self._options.release
        return Executable(run, range(len(record.inputs)), tensors, slots, STORE, release=release)

    def _recorded(
        self,
        model: Any,
        identity: Identity,
        through_dynamo: Callable[[], Any],
        kwargs: dict[str, Any],
    ) -> Any:
        """The call by Dynamo; written down if it is one graph of which the logits come."""
        with watched() as made:
            outputs = through_dynamo()
        folder = self._folder(model)
        try:
            if folder is not None and _whole(made, outputs, kwargs):
                # a module that changed itself would have to be changed by a replay
                if of_model(model) != identity[0]:
                    raise ValueError("the call changed the model")
                record = record_of(made[0], {"self": model, "kwargs": kwargs})
                files.write(folder, self._key(identity), record, code_of(made[0].compiled))
        except (ValueError, OSError) as error:
            log.info("the call is not recorded: %s", error)
        for each in made:
            each.forget()
        return outputs


def _whole(made: list[Made], outputs: Any, kwargs: Mapping[str, Any]) -> bool:
    """Was it one graph, and are its logits and the cache all that came out?"""
    if len(made) != 1 or type(outputs) is not CausalLMOutputWithPast:
        return False
    result, cache = made[0].result, kwargs["past_key_values"]
    return (
        result is not None
        and len(result) == 1
        and outputs.keys() == {"logits", "past_key_values"}
        and outputs.logits is result[0]
        and outputs.past_key_values is cache
        and not any(layer.empty for layer in cache.layers)
    )


def _tensors(values: list[Any]) -> list[torch.Tensor]:
    return [value for value in values if isinstance(value, torch.Tensor)]


def _parameters(record: Record, roots: dict[str, Any]) -> list[Any]:
    return [resolve(source, roots) for weight in record.weights for source in weight.sources]


def _bundle(weight: Weight, roots: dict[str, Any]) -> Bundle:
    refs = [
        WeightRef(resolve(source, roots), transposed, name, eight=weight.eight)
        for source, transposed, name in zip(
            weight.sources, weight.transposed, weight.names, strict=True
        )
    ]
    return STORE.bundle(refs, weight.group_size, glu=weight.glu)


def digest_of(manifest: Any) -> str:
    """Of everything an artifact's manifest says, the checksums of its files among it."""
    return hashlib.sha256(repr(manifest).encode()).hexdigest()
