"""The inputs of a step: transformers', and what qoqc's attention needs to know."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs
from transformers.generation.continuous_batching.utils import stream_context

from qoqc.codegen.invariance import invariant
from qoqc.errors import QoqcError, own_error
from qoqc.runtime.dynamo import vary
from qoqc.serve import attention
from qoqc.serve.ragged import RaggedStep, Rows
from qoqc.serve.tiled import TiledStep
from qoqc.serve.transformers_5_23.cache import KV4PagedCache
from qoqc.serve.work import Work

ROW_STEP = 8
"""Logit rows of a step with prompts come in multiples of this, so that few shapes occur."""


class Inputs(ContinuousBatchingIOs):
    """Inputs and outputs whose batches have a `step` for the attention.

    invariant  what a request is answered does not depend on the others (tiled.py)
    """

    def __init__(self, cache: KV4PagedCache, invariant: bool, **kwargs: Any) -> None:
        self.step: attention.Step | None = None
        self.invariant = invariant
        self._rows: Rows | None = None
        super().__init__(cache=cache, **kwargs)
        if not invariant:
            layers, most = len(cache.pages.layers), self.max_requests_per_batch
            self._rows = Rows(most, cache.max_blocks_per_request, layers, cache.device)

    def reset(self) -> None:
        """Forget the batches so far."""
        with stream_context(self.compute_stream):
            super().reset()

    def prepare_batch_tensors(
        self,
        requests_in_batch: Sequence[Any],
        logits_processors: Any,
        use_decode_fast_path: bool,
        num_q_tokens: int,
        max_kv_read: int,
        use_padding: bool,
    ) -> None:
        """As transformers does, and `step`."""
        # one token would be a graph of its own to torch.compile
        num_q_tokens = max(2, num_q_tokens)
        works = [
            Work(
                self.cache.blocks_of(request.state.request_id),
                request.state.position_offset,
                request.query_length,
            )
            for request in requests_in_batch
        ]
        # transformers writes on another stream than it computes on, and waits for neither
        with stream_context(self.compute_stream):
            super().prepare_batch_tensors(
                requests_in_batch,
                logits_processors,
                use_decode_fast_path,
                num_q_tokens,
                max_kv_read,
                use_padding,
            )
            if self._rows is None:
                self.step = TiledStep(self.cache.pages, works, num_q_tokens)
            else:
                self.step = RaggedStep(self.cache.pages, self._rows, works, num_q_tokens)

    def get_model_kwargs(self, use_padding: bool = False) -> Any:
        """What a forward and the choice of tokens after it need; nothing of single KV tokens."""
        rows = self.num_q_tokens
        if not self.use_block_table:
            rows = -(-self.num_request_in_batch // ROW_STEP) * ROW_STEP
        rows = min(rows, self.max_requests_per_batch)
        return {
            "input_ids": self.input_ids[: self.num_q_tokens].unsqueeze(0),
            "position_ids": self.position_ids[: self.num_q_tokens].unsqueeze(0),
            "logits_indices": self.logits_indices[:rows],
            "logits_processor_args": self._bulk_input_tensor[self.static_inputs :, :rows],
            # warm-up sets these
            "max_length_k": dict(self.max_length_k),
        }


class PagedForward:
    """A model as the engine calls it: the step's attention, and no arguments but its tokens."""

    def __init__(self, model: Any, inputs: Inputs) -> None:
        self._model = model
        self._inputs = inputs
        self._failure: QoqcError | None = None

    def require_no_failure(self) -> None:
        """Raise the last error of qoqc's that a call raised, whoever caught it."""
        if self._failure is not None:
            raise self._failure

    def __call__(self, input_ids: Any, position_ids: Any, **batch: Any) -> Any:
        """The model's output for a batch of `Inputs.get_model_kwargs`."""
        step = self._inputs.step
        assert step is not None, "a batch was prepared"
        wanted = {"logits_to_keep": batch["logits_to_keep"]} if "logits_to_keep" in batch else {}
        # one graph for all numbers of tokens and of logit rows, from the first step on
        for tensor in (input_ids, position_ids, *wanted.values()):
            vary(tensor, tensor.dim() - 1)
        bits = invariant() if self._inputs.invariant else nullcontext()
        try:
            with attention.running(step), bits:
                return self._model(
                    input_ids=input_ids, position_ids=position_ids, use_cache=False, **wanted
                )
        except Exception as error:
            self._failure = own_error(error)
            raise

    def _supports_logits_to_keep(self) -> bool:
        return bool(self._model._supports_logits_to_keep())
