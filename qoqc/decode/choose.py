"""The choice of tokens in one generation: captured where it can be, by Python where it cannot."""

from __future__ import annotations

import torch

from qoqc.decode.request import Request
from qoqc.decode.select import Selection, draw
from qoqc.decode.steps import CacheSteps


class Chooser:
    """Chooses each next token into the buffers of `steps`, as the request's processors say.

    scores, logits  what was asked to be returned: for each step float32 [batch, vocabulary]
    """

    def __init__(self, request: Request, steps: CacheSteps) -> None:
        self._steps, self._buffers = steps, steps.buffers
        self._processors = request.processors
        self._criteria = request.asked_each_step
        self._do_sample = request.config.do_sample
        self._eos = request.eos
        self._pad = request.config._pad_token_tensor if self._eos is not None else None
        self._wants = request.wants_scores
        self._selection = None
        if request.selects_on_device:
            self._selection = Selection(
                self._buffers, self._processors, self._do_sample, self._eos, self._pad
            )
        self.scores: list[torch.Tensor] = []
        self.logits: list[torch.Tensor] = []

    def choose(self, logits: torch.Tensor, length: int) -> None:
        """Append a token to sequences of `length` ones; finish those that a criterion ends.

        logits [batch, vocabulary], of the prefill or of CacheSteps.forward
        """
        if self._selection is None:
            self._choose_on_host(logits, length)
        else:
            self._steps.select(self._selection, logits, length)
        for criterion in self._criteria:
            scores = tuple(self.scores) if self.scores else None
            self._buffers.finish(criterion(self._buffers.ids[:, : length + 1], scores))

    def _choose_on_host(self, logits: torch.Tensor, length: int) -> None:
        # a copy: processors may write into it
        raw = logits.to(torch.float32, copy=True)
        scores = self._processors(self._buffers.ids[:, :length], raw.clone())
        if self._wants:
            self.scores.append(scores)
            self.logits.append(raw)
        tokens = draw(scores) if self._do_sample else scores.argmax(-1)
        self._buffers.accept(tokens, self._eos, self._pad)
