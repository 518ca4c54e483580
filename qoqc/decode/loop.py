"""The loop in the place of GenerationMixin._sample: prefill, then steps that only the device runs.

transformers prepares everything: arguments, logits processors, stopping criteria, the cache. What
the loop cannot do goes to transformers' own loop, with a line in the log that says why.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers.generation.utils import GenerateDecoderOnlyOutput

from qoqc.decode.choose import Chooser
from qoqc.decode.inputs import StepInputs, step_inputs
from qoqc.decode.request import TOKEN_TYPES, Request, refusal
from qoqc.decode.select import ignored_prefix
from qoqc.decode.slices import prefill
from qoqc.decode.steps import Steps
from qoqc.decode.watch import Watch
from qoqc.errors import CacheFull
from qoqc.log import get_logger
from qoqc.records.replay import Records
from qoqc.runtime.dynamo import vary

log = get_logger("decode")


AXES = {2: (0, 1), 4: (0, 2, 3)}
"""The axes that differ from call to call, of tokens [B, S] and of masks [B, 1, S, T]."""


def install(model: Any, graphs: bool, records: Records | None = None) -> None:
    """Let model.generate() sample through this loop; `graphs` = steps become CUDA graphs.

    With `records` its calls are run without tracing the model where they were recorded before.

    generate() looks its loops up on the model's class, so the model gets a subclass of its own
    class, as torch's parametrizations and FSDP do it.
    """
    model.qoqc_steps = Steps(graphs)
    model.qoqc_records = records
    if not hasattr(type(model), "qoqc_loop"):
        kind: Any = type(model)
        model.__class__ = _with_loop(kind)


@functools.cache
def _with_loop(kind: Any) -> Any:
    """A class like `kind`, of the same name, that samples through this loop."""

    def sample(
        self: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """GenerationMixin._sample by qoqc's decode loop."""
        # generate() leaves it there after it has made the criteria of stop strings
        model_kwargs.pop("tokenizer", None)
        request = Request(
            self,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            streamer,
            model_kwargs,
        )
        inputs = refusal(request, synced_gpus) or step_inputs(request)
        if isinstance(inputs, StepInputs):
            return generate(request, inputs, self.qoqc_steps)
        log.info("transformers' own loop generates: %s", inputs)
        return kind._sample(
            self,
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            synced_gpus=synced_gpus,
            streamer=streamer,
            **model_kwargs,
        )

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Module.__call__, whose graphs are for tokens, positions and masks of any size."""
        for value in kwargs.values():
            # some models take a mask for each kind of layer
            for each in value.values() if isinstance(value, dict) else (value,):
                if isinstance(each, torch.Tensor) and each.dim() in AXES:
                    vary(each, *AXES[each.dim()])
        if self.qoqc_records is None or args or torch.compiler.is_compiling():
            return kind.__call__(self, *args, **kwargs)
        through_dynamo = functools.partial(kind.__call__, self, **kwargs)
        return self.qoqc_records.call(self, through_dynamo, kwargs)

    members = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "__call__": call,
        "_sample": sample,
        "qoqc_loop": True,
    }
    return type(kind.__name__, (kind,), members)


def generate(request: Request, inputs: StepInputs, steps: Steps) -> Any:
    """Serve a request that `refusal` lets pass; the result is GenerationMixin._sample's.

    inputs  what `step_inputs` found

    Raises CacheFull when a cache that the caller gave holds fewer tokens than are generated.
    """
    model, cache = request.model, request.cache
    fresh, kwargs = cache.layers[0].empty, _without_idle_mask(request, inputs)
    mask = request.kwargs["attention_mask"] if inputs.padded else None
    length, cached = request.input_ids.shape[1], request.input_ids.shape[1]
    capacity = cache.get_max_length()
    _require_room(length, capacity)
    logits = prefill(request, kwargs)
    if not fresh:
        cached = int(cache.get_seq_length())
        _require_room(cached, capacity)
    own = steps.of(model, cache)
    ignored = ignored_prefix(request.processors)
    own.buffers.begin(request.input_ids, inputs.position, mask, ignored)
    chooser = Chooser(request, own)
    watch = Watch(own.buffers, request.streamer, lag=1 if request.may_overshoot else 0)
    with model._optimize_model_for_decode():
        chooser.choose(logits, length)
        length += 1
        while not watch.step_done(length) and length != request.max_length:
            _require_room(cached + 1, capacity)
            logits = own.forward(inputs)
            chooser.choose(logits, length)
            length, cached = length + 1, cached + 1
    final = watch.all_done(length)
    cache.rewind(length - final)
    tokens = own.buffers.ids[:, :final].clone()
    return _result(request, tokens, chooser, final - request.input_ids.shape[1])


def _without_idle_mask(request: Request, inputs: StepInputs) -> dict[str, Any]:
    """The model's arguments, without a mask that hides nothing.

    Attention is causal then and needs none, which more kernels can do. Some releases of
    transformers leave it out by themselves. Where a cache goes on, its length tells them how much
    of the prompt is new; and models may look at it for what else they are given, images.
    """
    whole = request.config.prefill_chunk_size is None and request.cache.layers[0].empty
    if whole and not inputs.padded and request.others <= TOKEN_TYPES:
        return {**request.kwargs, "attention_mask": None}
    return request.kwargs


def _require_room(tokens: int, capacity: int) -> None:
    # the kernels drop tokens beyond the end: nothing on the device would say so
    if tokens > capacity:
        raise CacheFull(
            f"the KV cache holds {capacity} tokens, token {tokens} was appended; "
            "allocate it with a larger max_cache_len"
        )


def _result(request: Request, tokens: torch.Tensor, chooser: Chooser, new: int) -> Any:
    """`tokens`, or with them what return_dict_in_generate asks for, of `new` steps."""
    config = request.config
    if not config.return_dict_in_generate:
        return tokens
    return GenerateDecoderOnlyOutput(
        sequences=tokens,
        scores=tuple(chooser.scores[:new]) if config.output_scores else None,
        logits=tuple(chooser.logits[:new]) if config.output_logits else None,
        past_key_values=request.cache,
    )
