"""What a server allows: every limit a request can run into, in one place."""

from __future__ import annotations

import dataclasses
import math

from qoqc.errors import OptionError


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of one server.

    model_name     the model's name in /v1/models; requests must name it
    api_key        what `Authorization: Bearer` must hold, on every route but /health; None = open
    max_pending    requests accepted and not yet answered, running ones included; beyond it: 429
    max_tokens     most tokens a request may generate; None = what the context leaves
    max_body       bytes of a request's body; beyond it: 413
    timeout        seconds a request may take, waiting included; then it is cancelled: 504. Also
                   for its body to arrive: 408
    grace          seconds that open requests have after SIGTERM before they are cut off
    """

    model_name: str
    api_key: str | None = None
    max_pending: int = 1024
    max_tokens: int | None = None
    max_body: int = 2 * 2**20
    timeout: float = 600.0
    grace: float = 30.0

    def __post_init__(self) -> None:
        for name in ("max_pending", "max_body", "timeout", "max_tokens"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise OptionError(f"--{name.replace('_', '-')} {value}: expected a number above 0")
        if not 0 <= self.grace < math.inf:
            raise OptionError(f"--grace {self.grace}: expected seconds, 0 or more")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.strip()):
            raise OptionError("the API key is empty or not ASCII: HTTP headers cannot carry it")
