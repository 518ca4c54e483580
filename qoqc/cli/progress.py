"""The progress display of long work: on a terminal only, on stderr, gone when done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console(stderr=True, highlight=False)


class Steps:
    """One bar per step; a step of unknown length pulses."""

    def __init__(self, progress: Progress) -> None:
        """Steps shown by `progress`."""
        self._progress = progress
        self._task: TaskID | None = None

    def start(self, name: str) -> None:
        """The step before is done; `name` begins."""
        self.finish()
        self._task = self._progress.add_task(name, total=None)

    def update(self, done: int, total: int) -> None:
        """How far the current step is."""
        if self._task is not None:
            self._progress.update(self._task, completed=done, total=total)

    def finish(self) -> None:
        """The current step is done."""
        if self._task is not None:
            self._progress.update(self._task, total=1, completed=1)
            self._task = None


@contextmanager
def steps() -> Iterator[Steps]:
    """Show the steps of a piece of work while the block runs."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        yield Steps(progress)


@contextmanager
def waiting(what: str) -> Iterator[Callable[[], None]]:
    """Show a spinner while the block runs, or until the function it yields is called."""
    if not console.is_terminal:
        yield lambda: None
        return
    with console.status(what) as status:
        yield status.stop
