"""`engine(model)`: continuous batching for a compiled model, over pages of 4 bit."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from transformers.generation.configuration_utils import ContinuousBatchingConfig

from qoqc.errors import Unsupported
from qoqc.generate import WITHOUT_GRAPHS
from qoqc.ir.spec import KVSpec
from qoqc.serve import attention, releases
from qoqc.serve.accounting import Limits


def engine(
    model: Any,
    *,
    max_tokens_per_batch: int | None = None,
    num_pages: int | None = None,
    memory_fraction: float | None = None,
    max_requests: int | None = None,
    generation_config: Any = None,
    invariant: bool | None = None,
    config: ContinuousBatchingConfig | None = None,
    workload: Any = None,
) -> Any:
    """A ContinuousBatchingManager for a model of qoqc.compile or qoqc.load, not started yet.

    max_tokens_per_batch  tokens of one forward; prompts are cut into chunks (8192, CPU: 1024)
    num_pages             pages of 64 tokens, of all layers (what fits)
    memory_fraction       of the memory free next to the weights, if num_pages is not given (0.9)
    max_requests          requests of one forward; more wait (256)
    generation_config     the model's own if None; max_new_tokens and eos_token_id per request win
    invariant             answers have the same bits whatever else is in the batch; on a GPU decode
                          steps are slower then, and not CUDA graphs (on a CPU True, else False)
    config, workload      transformers' own settings and hints; arguments above win

    It has free_pages and total_pages, and request_tokens, the longest request it takes. Until it is
    stopped the model is its own: the model's generate() has no cache then. Tokens attend to keys
    and values as later tokens read them (Options.prefill_kv="quantized"): how prompts are cut, and
    which prefix is shared, changes nothing.

    Raises Unsupported for other releases of transformers, models without keys and values in every
    layer or with attention that cannot be replaced, and where no page fits into memory.
    """
    host = releases.host()
    config = ContinuousBatchingConfig() if config is None else config
    if generation_config is None:
        generation_config = model.generation_config
    generation_config = copy.deepcopy(generation_config)
    if generation_config.eos_token_id is None:
        generation_config.eos_token_id = -1  # transformers' word for none
    limits = Limits(
        _first(max_tokens_per_batch, config.max_batch_tokens),
        _first(max_requests, config.max_requests_per_batch, workload and workload.num_requests),
        _first(num_pages, config.num_blocks),
        _first(memory_fraction, config.max_memory_percent),
        _longest(workload),
    )
    return host.Manager(
        model,
        generation_config,
        config,
        workload,
        specs=kv_specs(model),
        limits=limits,
        invariant=_first(invariant, model.device.type != "cuda"),
    )


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _longest(workload: Any) -> int | None:
    """Tokens of the longest request in a workload; None if it may generate any number."""
    if workload is None or not workload.max_generated_length:
        return None
    tokens: int = workload.max_prompt_length + workload.max_generated_length
    return tokens


def install(model: Any) -> None:
    """Let `model.generate_batch(...)`, and what else transformers batches, run on `engine`."""
    releases.host()

    def init_continuous_batching(
        generation_config: Any = None,
        continuous_batching_config: Any = None,
        workload_hints: Any = None,
    ) -> Any:
        """As GenerationMixin's: a manager, or the one that was kept."""
        kept = getattr(model, "_cached_continuous_batching_manager", None)
        if kept is not None:
            kept.switch_to_cb_friendly_attn(model)
            return kept
        return engine(
            model,
            generation_config=generation_config,
            config=continuous_batching_config,
            workload=workload_hints,
        )

    model.init_continuous_batching = init_continuous_batching


def kv_specs(model: Any) -> list[KVSpec]:
    """The format of every layer's pages: heads as the model has them, bits as it was compiled.

    Raises Unsupported for models that are not compiled or in graphs that cannot be served, and for
    layers kept in 16 bit.
    """
    options = getattr(model, "qoqc_options", None)
    if options is None or options.kv_bits == 16:
        raise Unsupported(
            f"{type(model).__name__} is not compiled for a 4- or 8-bit cache; "
            "model = qoqc.compile(model), or qoqc.load(artifact), first"
        )
    if not options.graphs and options.mode in WITHOUT_GRAPHS:
        raise Unsupported(
            f"mode={options.mode!r} without graphs=True puts CUDA graphs of Inductor's around a "
            "forward whose requests change; compile the model with graphs=True or another mode"
        )
    specs = attention.probe(model)
    bits = options.layer_bits(len(specs))
    if 16 in bits:
        raise Unsupported(
            f"layer {bits.index(16)} keeps its keys and values in 16 bit, and pages have 4 or 8; "
            "load the model with kv_layers of 4 and 8"
        )
    return [dataclasses.replace(spec, bits=b) for spec, b in zip(specs, bits, strict=True)]
