from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from qoqc.codegen import facts as facts_module
from qoqc.codegen.facts import by_facts, facts

X = torch.zeros(4, 6)


class Counted:
    """A function of a tensor's shape that counts its runs."""

    def __init__(self) -> None:
        self.runs = 0
        self.ask: Callable[..., int] = by_facts(self._run)

    def _run(self, x: torch.Tensor | None, kind: str = "a") -> int:
        self.runs += 1
        if x is None:
            raise ValueError("no x")
        return x.shape[0]


@pytest.fixture
def counted() -> Counted:
    return Counted()


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(4, 7),
        torch.zeros(6, 4).T,
        torch.zeros(4, 6).half(),
        torch.zeros(4, 6, device="meta"),
        None,
    ],
)
def test_facts_differ_by_shape_strides_dtype_and_device(other: torch.Tensor | None) -> None:
    assert facts(X, "a") != facts(other, "a")


def test_facts_are_equal_for_other_values_and_addresses() -> None:
    assert facts(X, None, torch.half) == facts(torch.ones(4, 6), None, torch.half)
    assert facts(torch.nn.Parameter(X)) == facts(X)
    assert facts(X, "a") != facts(X, "b")


def test_like_calls_run_once(counted: Counted) -> None:
    assert [counted.ask(x, "a") for x in (X, torch.ones(4, 6), X)] == [4, 4, 4]
    assert counted.runs == 1
    assert counted.ask(torch.zeros(5, 6), "a") == 5
    assert counted.runs == 2


def test_an_error_is_raised_for_every_call(counted: Counted) -> None:
    for runs in (1, 2):
        with pytest.raises(ValueError, match="no x"):
            counted.ask(None)
        assert counted.runs == runs


def test_calls_by_keyword_are_right_though_not_kept(counted: Counted) -> None:
    assert counted.ask(X) == counted.ask(X, kind="b") == 4
    assert counted.runs == 2


def test_symbolic_sizes_are_right_though_not_kept(counted: Counted) -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    x = mode.from_tensor(torch.zeros(7, 3))
    assert not isinstance(x.shape[0], int)
    for _ in range(2):
        assert counted.ask(x) == 7
    assert counted.runs == 2


def test_no_tensor_is_kept_alive(counted: Counted) -> None:
    x = torch.zeros(3, 3)
    storage = torch.multiprocessing.reductions.StorageWeakRef(x.untyped_storage())
    counted.ask(x)
    del x
    assert storage.expired()


def test_ten_thousand_lengths_do_not_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts_module, "KEPT", 100)
    alive: list[object] = []

    class Result:
        """What is kept, as long as it is."""

        def __init__(self) -> None:
            alive.append(None)

        def __del__(self) -> None:
            alive.pop()

    ask = by_facts(lambda x: Result())
    row = torch.zeros(1, 1)
    for length in range(1, 10_001):
        ask(row.expand(length, 1))
        assert len(alive) <= 101
    assert len(alive) > 0


def test_threads_get_what_they_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts_module, "KEPT", 3)  # kept and dropped all the time
    ask = by_facts(lambda x: x.shape[0])
    wrong: list[int] = []

    def work() -> None:
        for turn in range(3000):
            length = turn % 7
            if ask(torch.empty(length, 2)) != length:
                wrong.append(length)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
