"""The tensors a decode step reads and writes in place: same addresses from step to step."""

from __future__ import annotations

import torch


class Buffers:
    """The state of a generation, for `batch` sequences whose cache holds `capacity` tokens each.

    ids       int64 [batch, capacity + 1]: all tokens so far, in the first `place` columns
    token     int64 [batch, 1]: the last token, which the next forward reads
    position  int64 [batch, 1]: its position, as the model counts
    place     int64 [1]: where in `ids` the next token goes
    ignored   int64 [batch, 1]: leading tokens that a repetition penalty does not count
    mask      int64 [batch, capacity]: 0 where the prompt is padding
    going     bool [batch]: sequences that are not finished
    any_going bool [1]
    """

    def __init__(self, batch: int, capacity: int, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.capacity = capacity
        self.ids = zeros(batch, capacity + 1)
        self.token = zeros(batch, 1)
        self.position = zeros(batch, 1)
        self.place = zeros(1)
        self.ignored = zeros(batch, 1)
        self.mask = zeros(batch, capacity)
        self.going = zeros(batch, dtype=torch.bool)
        self.any_going = zeros(1, dtype=torch.bool)

    def begin(
        self,
        ids: torch.Tensor,
        position: torch.Tensor | None,
        mask: torch.Tensor | None,
        ignored: torch.Tensor | int,
    ) -> None:
        """Start a generation after the prompts `ids` [batch, L].

        position  of the next tokens, [batch or 1, 1]; None if the model takes none
        mask      [batch, tokens in the cache] or None, 0 where they are padding
        ignored   leading tokens that a repetition penalty does not count: int, or [batch]
        """
        length = ids.shape[1]
        self.ids[:, :length] = ids
        if position is not None:
            # of the last tokens: the first that is chosen counts it up
            self.position.copy_((position - 1).expand_as(self.position))
        self.place.fill_(length)
        self.ignored[:, 0] = ignored
        self.mask.fill_(1)
        if mask is not None:
            self.mask[:, : mask.shape[1]] = mask
        self.going.fill_(True)
        self.any_going.fill_(True)

    def accept(
        self, tokens: torch.Tensor, eos: torch.Tensor | None, pad: torch.Tensor | None
    ) -> None:
        """Append `tokens` [batch]; a sequence is finished once it has a token of `eos` [n].

        Finished sequences get `pad` instead, if there is an `eos`.
        """
        if eos is not None and pad is not None:
            tokens = torch.where(self.going, tokens, pad)
        self.ids.index_copy_(1, self.place, tokens[:, None])
        self.token.copy_(tokens[:, None])
        self.position.add_(1)
        self.place.add_(1)
        if eos is not None:
            self.finish((tokens[:, None] == eos).any(-1))

    def finish(self, done: torch.Tensor) -> None:
        """Mark the sequences of the bool [batch] as finished."""
        self.going.logical_and_(~done)
        torch.any(self.going, dim=0, keepdim=True, out=self.any_going)
