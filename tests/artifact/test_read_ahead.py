"""Reading ahead: any order, a limit that holds, and no thread left behind. No files, no clock."""

from __future__ import annotations

import random
import threading

import pytest

from qoqc.artifact.read_ahead import ReadAhead

NAMES = [f"t{number}" for number in range(40)]
SECONDS = 30
"""What hangs is ended after so long."""


class Slow:
    """Reads that end when they are let go, one by one or all; counts what was begun."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self._lock = threading.Lock()
        self._gate = threading.Semaphore(0)

    def __call__(self, name: str) -> str:
        with self._lock:
            self.begun.append(name)
        assert self._gate.acquire(timeout=SECONDS), f"{name} was never let go"
        return f"value of {name}"

    def let_go(self, count: int = 1000) -> None:
        self._gate.release(count)


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("qoqc-read")]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("limit", [1, 25, 10_000])
def test_any_order_gives_what_was_asked_for(seed: int, limit: int) -> None:
    order = random.Random(seed).sample(NAMES, len(NAMES))
    with ReadAhead(lambda name: f"value of {name}", lambda name: 10, limit=limit) as ahead:
        ahead.expect(NAMES[:20])
        ahead.expect(NAMES[10:35])  # some again, and five never
        assert [ahead.take(name) for name in order] == [f"value of {name}" for name in order]
        assert ahead.take(NAMES[0]) == f"value of {NAMES[0]}", "a second time"


def test_each_is_read_once_and_in_order() -> None:
    begun: list[str] = []

    def read(name: str) -> str:
        begun.append(name)
        return name

    with ReadAhead(read, lambda name: 1, threads=1) as ahead:
        ahead.expect(NAMES)
        assert [ahead.take(name) for name in NAMES] == NAMES
    assert begun == NAMES


def test_it_is_read_before_it_is_asked_for() -> None:
    done = threading.Event()
    with ReadAhead(lambda name: done.set(), lambda name: 1) as ahead:
        ahead.expect(["a"])
        assert done.wait(SECONDS)


def test_room_is_given_back_by_what_is_taken() -> None:
    done = threading.Event()

    def read(name: str) -> None:
        if name == "t2":
            done.set()

    with ReadAhead(read, lambda name: 10, limit=10) as ahead:
        ahead.expect(NAMES[:3])
        ahead.take("t0")
        assert not done.is_set()
        ahead.take("t1")
        assert done.wait(SECONDS), "nobody asked for it yet"


def test_what_is_in_flight_is_bounded() -> None:
    slow = Slow()
    sizes = dict.fromkeys(NAMES, 10) | {"t7": 1000}
    slow.let_go()
    with ReadAhead(slow, sizes.__getitem__, threads=4, limit=30) as ahead:
        ahead.expect(NAMES)
        for taken, name in enumerate(NAMES):
            # nothing of 30 bytes can be begun beyond the three that wait here to be taken; the
            # large one alone
            begun = set(slow.begun) - set(NAMES[:taken])
            assert sum(sizes[name] for name in begun) <= 30 or begun == {"t7"}
            ahead.take(name)
    assert sorted(slow.begun) == sorted(NAMES)


def test_threads_read_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    together = threading.Barrier(3, timeout=SECONDS)
    with ReadAhead(lambda name: together.wait(), lambda name: 1) as ahead:
        ahead.expect(NAMES[:3])
        assert sorted(ahead.take(name) for name in NAMES[:3]) == [0, 1, 2]


def test_an_error_is_raised_where_it_is_asked_for() -> None:
    def read(name: str) -> str:
        if name == "t1":
            raise ValueError(f"{name} is bad")
        return name

    with ReadAhead(read, lambda name: 1, limit=1) as ahead:
        ahead.expect(NAMES)
        assert ahead.take("t0") == "t0"
        with pytest.raises(ValueError, match="t1 is bad"):
            ahead.take("t1")
        assert [ahead.take(name) for name in NAMES[2:]] == NAMES[2:], "and the others come"


def test_leaving_early_ends_the_threads_and_begins_nothing_more() -> None:
    slow = Slow()
    with pytest.raises(KeyError):
        with ReadAhead(slow, lambda name: 1, threads=2) as ahead:
            ahead.expect(NAMES)
            assert readers()
            threading.Timer(0.2, slow.let_go).start()  # those that run when the block is left
            raise KeyError
    assert not readers()
    assert len(slow.begun) <= 2
