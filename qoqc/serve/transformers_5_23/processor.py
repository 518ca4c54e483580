"""The state of the generation loop, with inputs and a forward that know pages."""

from __future__ import annotations

from typing import Any

import torch
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor
from transformers.generation.continuous_batching.model_runner import ModelRunner

from qoqc.ir.spec import PAGE
from qoqc.serve.transformers_5_23.inputs import Inputs, PagedForward
from qoqc.serve.work import warm_sizes


class Processor(ContinuousBatchProcessor):
    """A ContinuousBatchProcessor over a KV4PagedCache."""

    def __init__(self, invariant: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.inputs_and_outputs = Inputs(
            cache=self.cache,
            invariant=invariant,
            config=self.config,
            continuous_batching_config=self.cb_config,
            device=self.model_device,
            model_dtype=self.model_dtype,
            logit_processor=self.logit_processor,
        )
        # both were made with transformers' own inputs, and take nothing else from them
        self.offloading_manager._compute_stream = self.inputs_and_outputs.compute_stream
        self.model_runner = ModelRunner(
            logit_processor=self.logit_processor,
            cb_config=self.cb_config,
            cache=self.cache,
            inputs_and_outputs=self.inputs_and_outputs,
            do_sample=self.do_sample,
            return_logprobs=self.return_logprobs,
        )

    @torch.no_grad()
    def _generation_step(self, model: Any) -> None:
        super()._generation_step(PagedForward(model, self.inputs_and_outputs))

    @torch.no_grad()
    def warmup(self, model: Any) -> None:
        """Compile the model for steps, and capture CUDA graphs if there are to be any.

        Raises the error of qoqc's, if there was one; transformers logs it, and would go on.
        """
        most = min(self.max_batch_tokens, PAGE * self.cache.free_pages)
        forward = PagedForward(model, self.inputs_and_outputs)
        super().warmup(forward)  # without graphs to be captured transformers sees nothing to do
        for tokens in warm_sizes(most, self.model_device):
            forward.require_no_failure()
            self.model_runner.run_one_warmup(forward, num_q_tokens=tokens, max_kv_read=0)
        self.cache.reset()
        forward.require_no_failure()
