"""The manager whose requests have their keys and values in qoqc's pages."""

from __future__ import annotations

from typing import Any

import torch
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from transformers.generation.continuous_batching.initialization import (
    update_cb_config_after_cache_creation,
)
from transformers.generation.continuous_batching.requests import RequestState
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING

from qoqc.backend import MAX_GRAPHS
from qoqc.errors import CacheFull, OptionError, Unsupported
from qoqc.ir.spec import PAGE, KVSpec
from qoqc.runtime.dynamo import allow_graphs
from qoqc.serve import attention
from qoqc.serve.accounting import Limits, resolve
from qoqc.serve.pages import Pages
from qoqc.serve.transformers_5_23.cache import KV4PagedCache
from qoqc.serve.transformers_5_23.processor import Processor

OFFLOADING_DEVICES = ("cuda",)
"""Devices that have a memory of their own, and pinned memory on the host to copy to."""


class Manager(ContinuousBatchingManager):
    """A ContinuousBatchingManager over pages of 4 or 8 bit.

    free_pages, total_pages  pages of 64 tokens; both 0 while there is no cache: before `warmup` or
                             `start`, and after `stop`
    request_tokens           the longest request it takes, prompt and output
    """

    _original_attn_impl: str | None

    def __init__(
        self,
        model: Any,
        generation_config: Any,
        continuous_batching_config: Any,
        workload_hints: Any,
        *,
        specs: list[KVSpec],
        limits: Limits,
        invariant: bool,
    ) -> None:
        """specs: of the model's layers; invariant as in `engine`.

        Raises Unsupported, ValueError, OptionError.
        """
        cb_config = continuous_batching_config
        if cb_config.cpu_offload_space != 0 and model.device.type not in OFFLOADING_DEVICES:
            raise OptionError(
                "cpu_offload_space moves pages from a GPU's memory to the host's; "
                f"the model is on {model.device}, so leave it at 0"
            )
        self._specs, self._invariant = specs, invariant
        config = model.config.get_text_config()
        self._sizes = resolve(limits, config, specs, model.device, model.dtype)
        super().__init__(model, generation_config, cb_config, workload_hints)
        resolved = self.continuous_batching_config
        # transformers sees no flash attention and takes away what needs one
        resolved.page_size = PAGE
        resolved.max_blocks_per_request = self._sizes.pages_per_request
        resolved.max_requests_per_batch = self._sizes.max_requests
        # steps with prompts, and tiles, are launched by their lengths: no two are alike
        graphs = model.device.type == "cuda" and not invariant
        resolved.use_cuda_graph = (False, graphs and _decode_graphs(cb_config.use_cuda_graph))
        resolved.use_async_batching = False
        # the model is compiled, its forward in one piece
        resolved.varlen_compile_config = resolved.decode_compile_config = None

    @property
    def request_tokens(self) -> int:
        """The longest request there can be, in tokens of prompt and output."""
        return self._sizes.request_tokens

    @property
    def total_pages(self) -> int:
        """Pages of the cache."""
        cache = self._cache()
        return 0 if cache is None else cache.num_blocks

    @property
    def free_pages(self) -> int:
        """Pages that no request has; some are kept for their prefix until they are needed."""
        cache = self._cache()
        return 0 if cache is None else cache.free_pages

    def _cache(self) -> KV4PagedCache | None:
        processor = self.batch_processor
        return None if processor is None else processor.cache

    def switch_to_cb_friendly_attn(self, model: Any, auto_switch_to_flash: bool = True) -> None:
        """Give the model the attention over pages; `stop` gives it back its own."""
        if self._original_attn_impl is not None:
            return
        if model.config.get_text_config()._attn_implementation == attention.NAME:
            raise Unsupported(
                f"{type(model).__name__} serves requests in another engine; stop that one first"
            )
        self._original_attn_impl = attention.adopt(model)

    def warmup(self) -> None:
        """Make the cache, compile the model, capture CUDA graphs if there are to be any."""
        self.switch_to_cb_friendly_attn(self.model)
        allow_graphs(MAX_GRAPHS)
        super().warmup()

    def _run_generation_loop(self) -> None:
        # settings of torch's belong to a thread, and this one is new: with its default of 8 graphs
        # Dynamo would run a model uncompiled if the process has compiled that many
        allow_graphs(MAX_GRAPHS)
        super()._run_generation_loop()

    def start(self) -> None:
        """Start the thread that serves requests; again after `stop`, too."""
        self.switch_to_cb_friendly_attn(self.model)
        super().start()

    def stop(self, *args: Any, **kwargs: Any) -> None:
        """As transformers'; gives the model back also if it was never started."""
        super().stop(*args, **kwargs)
        if self._original_attn_impl is not None:
            self.model.set_attn_implementation(self._original_attn_impl)
            self._original_attn_impl = None
            self.batch_processor = None

    def add_request(
        self,
        input_ids: list[int],
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        eos_token_id: int | list[int] | None = None,
        **logit_processor_kwargs: Any,
    ) -> str | None:
        """As transformers'; without a limit a request ends where its tokens have no room.

        A request that can never be served ends as failed at once, with the reason as its error:
        transformers' loop would end with it, and all other requests too.
        """
        limit = max_new_tokens
        if limit is None:
            limit = self.generation_config.max_new_tokens
        if limit is None:
            limit = self.request_tokens - len(input_ids)
        reason = self._refusal(input_ids, limit)
        if reason is None or not self.is_tp_driver:
            added: str | None = super().add_request(
                input_ids, request_id, limit, streaming, record_timestamps, eos_token_id,
                **logit_processor_kwargs,
            )  # fmt: skip
            return added
        with self._request_lock:
            self._request_counter += request_id is None
            name = request_id or f"req_{self._request_counter - 1}"
        state = RequestState(request_id=name, initial_tokens=list(input_ids), streaming=streaming)
        self.output_router.fail_and_deliver(state, reason)
        return name

    def _refusal(self, input_ids: list[int], new_tokens: int) -> Exception | None:
        vocabulary = self.model.config.get_text_config().vocab_size
        if not input_ids:
            return ValueError("the prompt is empty; give it a token to begin with")
        if min(input_ids) < 0 or max(input_ids) >= vocabulary:
            return ValueError(f"a token id is not in the vocabulary of {vocabulary} tokens")
        if new_tokens < 1 or len(input_ids) + new_tokens > self.request_tokens:
            return CacheFull(
                f"a prompt of {len(input_ids)} tokens and {new_tokens} new ones: expected at least "
                f"1 new one, and at most {self.request_tokens} in all; shorten it, or make the "
                "engine with more num_pages"
            )
        return None

    def _create_batch_processor(self) -> Processor:
        if self.batch_processor is not None:
            self.batch_processor.reset()
            kept: Processor = self.batch_processor
            return kept
        cb_config, sizes = self.continuous_batching_config, self._sizes
        config, device = self.model.config.get_text_config(), self.model.device
        with torch.inference_mode(False):
            pages = Pages(self._specs, sizes.num_pages, device)
        sharing = cb_config.allow_block_sharing
        cache = KV4PagedCache(config, pages, sizes, self.model.dtype, sharing)
        self._use_prefix_sharing = sharing
        update_cb_config_after_cache_creation(cb_config, cache.num_blocks, cache.max_batch_tokens)
        if cb_config.scheduler_type not in SCHEDULER_MAPPING:
            raise OptionError(
                f"scheduler_type={cb_config.scheduler_type!r}: expected one of "
                f"{', '.join(SCHEDULER_MAPPING)}"
            )
        scheduler = SCHEDULER_MAPPING[cb_config.scheduler_type](
            cache=cache,
            safety_margin=cb_config.safety_margin,
            max_requests_per_batch=cb_config.max_requests_per_batch,
        )
        processor = Processor(
            invariant=self._invariant,
            cache=cache,
            config=config,
            generation_config=self.generation_config,
            continuous_batching_config=cb_config,
            logit_processor=self.logit_processor,
            input_queue=self.input_queue if self.is_tp_driver else None,
            cancel_queue=self.cancel_queue if self.is_tp_driver else None,
            output_router=self.output_router,
            background_thread_status=self.background_thread_status,
            model_device=device,
            model_dtype=self.model.dtype,
            scheduler=scheduler,
            distributed_helper=self.distributed_helper,
        )
        if device.type == "cuda":
            # all was zeroed on this stream, and steps run on one of their own
            torch.cuda.synchronize(device)
        return processor


def _decode_graphs(asked: bool | tuple[bool, bool] | None) -> bool:
    """Whether decode steps may be CUDA graphs: ContinuousBatchingConfig.use_cuda_graph."""
    return asked is None or (asked if isinstance(asked, bool) else asked[1])
