"""What calibration remembers of a linear's inputs: X^T X and the largest |x| of each channel."""

from __future__ import annotations

import torch

from qoqc.errors import Unsupported


class Hessian:
    """Sums over all tokens seen so far by the linears that share one input of K channels.

    With the error dW of a weight [N, K], `trace(dW @ matrix() @ dW.T)` is the mean squared error
    of the outputs, summed over the N channels: the objective of GPTQ and of the clip search.

    tokens   tokens added
    absmax   fp32 [K], the largest |x| of each channel
    """

    def __init__(self, in_features: int, name: str, device: torch.device | str = "cpu") -> None:
        """No tokens yet. `name` is the layer that errors speak of."""
        self.name = name
        self.tokens = 0
        self.absmax = torch.zeros(in_features, device=device)
        self._sum = torch.zeros(in_features, in_features, device=device)

    @torch.no_grad()
    def add(self, x: torch.Tensor) -> None:
        """Add the tokens of `x` float [..., K].

        Raises Unsupported, naming the layer, if x holds NaN or infinity or its sums overflow;
        ValueError if x has another number of channels. A refused x leaves the sums as they were.
        """
        features = self._sum.shape[0]
        if x.shape[-1] != features:
            raise ValueError(f"{self.name}: inputs of {x.shape[-1]} channels, expected {features}")
        flat = x.reshape(-1, features).to(self._sum.device, torch.float32)
        if not flat.shape[0]:
            return
        absmax = flat.abs().amax(0)
        if not torch.isfinite(absmax).all():
            raise Unsupported(
                f"{self.name}: the calibration activations hold NaN or infinity; check the model "
                "in 16 bit on this text, or load it with another dtype"
            )
        product = flat.t() @ flat
        if not torch.isfinite(product.diagonal()).all():
            raise Unsupported(
                f"{self.name}: the squares of the calibration activations (up to "
                f"{float(absmax.max()):.3g}) overflow; exclude this layer"
            )
        self._sum += product
        self.tokens += flat.shape[0]
        torch.maximum(self.absmax, absmax, out=self.absmax)

    def matrix(self) -> torch.Tensor:
        """The mean of x x^T over the tokens, fp32 [K, K], symmetric.

        Raises Unsupported when no token was added (an expert that no token was routed to).
        """
        if not self.tokens:
            raise Unsupported(
                f"{self.name}: no calibration token reached this layer; use more text, or round "
                "this weight to nearest"
            )
        mean = self._sum / self.tokens
        # a GEMM need not sum [i, j] and [j, i] in one order, and Cholesky reads one half only
        return (mean + mean.t()).mul_(0.5)
