"""Logging and dumps: quiet unless asked, one directory when asked."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qoqc.config import log_level


def get_logger(name: str) -> logging.Logger:
    """The logger `qoqc.<name>`, at the level QOQC_LOG asks for."""
    root = logging.getLogger("qoqc")
    if root.level == logging.NOTSET:
        root.setLevel(log_level())
    return root.getChild(name)


@contextmanager
def span(log: logging.Logger, what: str) -> Iterator[None]:
    """Log at DEBUG how long the block took, in milliseconds."""
    start = time.perf_counter()
    yield
    log.debug("%s: %.1f ms", what, (time.perf_counter() - start) * 1e3)


def dump(directory: str | None, name: str, text: str) -> None:
    """Write `text` to `directory/name`; nothing when no directory is set."""
    if directory is None:
        return
    path = Path(directory) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
