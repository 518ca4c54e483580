from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qoqc.codegen.family import Op, Tile
from qoqc.codegen.kernels.gemm_forms import GEMM
from qoqc.codegen.kernels.gemm_plain import GEMM_PLAIN
from qoqc.codegen.tuning import choose as choosing
from qoqc.codegen.tuning import table as tables
from qoqc.codegen.tuning.choose import bucket, choose, known
from qoqc.ir.spec import LinearSpec
from qoqc.runtime.device import device_key


def test_buckets() -> None:
    assert [bucket(n) for n in (0, 1, 2, 3, 17, 4097, 100_000)] == [1, 1, 2, 4, 32, 8192, 8192]


def test_heuristic_mode_times_nothing(
    op: Op, spec: Any, tiles: tuple[Tile, ...], table: Path, device: torch.device, clock: Any
) -> None:
    assert choose(op, spec, 9, device, "heuristic", clock()) == (op.forms[0], tiles[0])
    assert not table.exists()


def test_the_fastest_wins_and_is_remembered(
    op: Op,
    spec: Any,
    tiles: tuple[Tile, ...],
    table: Path,
    device: torch.device,
    clock: Any,
    forget: Callable[[], None],
) -> None:
    won = (op.forms[0], tiles[2])
    assert choose(op, spec, 9, device, "search", clock(4, 3, 1, 2)) == won
    for _ in range(2):
        # 9 and 16 tokens share a bucket; an empty clock would raise if anything were timed
        assert choose(op, spec, 16, device, "search", clock()) == won
        assert choose(op, spec, 16, device, "heuristic", clock()) == won
        assert known(op, spec, 16, device_key(device)) == won
        forget()
    (entry,) = json.loads(table.read_text())["entries"]
    assert entry["op"] == entry["form"] == "quantize"
    assert entry["size"] == 16
    assert entry["spec"] == {"features": 40, "dtype": "float32"}
    assert entry["device"]["name"] == device_key(device).name
    assert entry["tile"]["constexprs"] == dict(tiles[2].constexprs)
    assert choose(op, spec, 17, device, "search", clock(1, 2, 3, 4)) == (op.forms[0], tiles[0])
    assert len(json.loads(table.read_text())["entries"]) == 2


def test_an_edited_table_is_obeyed_while_legal(
    op: Op,
    spec: Any,
    tiles: tuple[Tile, ...],
    table: Path,
    device: torch.device,
    clock: Any,
    forget: Callable[[], None],
) -> None:
    choose(op, spec, 9, device, "search", clock(4, 3, 1, 2))
    text = json.loads(table.read_text())
    for rows, wanted in ((tiles[1]["ROWS"], tiles[1]), (999, tiles[0])):
        text["entries"][0]["tile"]["constexprs"]["ROWS"] = rows
        table.write_text(json.dumps(text))
        forget()
        found = choose(op, spec, 9, device, "search", clock(1, 2, 3, 4))
        assert found == (op.forms[0], wanted)


def test_the_shipped_table_comes_after_the_users_and_before_a_search(
    op: Op,
    spec: Any,
    tiles: tuple[Tile, ...],
    table: Path,
    device: torch.device,
    clock: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    form, key = op.forms[0], device_key(device)
    entry = tables.entry_key(op, spec, 16, key)
    monkeypatch.setattr(tables, "shipped", lambda: {entry: (form.name, tiles[1])})
    assert choose(op, spec, 9, device, "search", clock()) == (form, tiles[1])
    tables.record(entry, form, tiles[3])
    assert choose(op, spec, 9, device, "heuristic", clock()) == (form, tiles[3])
    assert known(op, spec, 9, key) == (form, tiles[3])


def test_no_search_while_a_graph_is_captured(
    op: Op,
    spec: Any,
    tiles: tuple[Tile, ...],
    table: Path,
    clock: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = torch.device("cuda")
    monkeypatch.setattr(choosing, "device_key", lambda _: device_key(torch.device("cpu")))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose(op, spec, 9, device, "search", clock()) == (op.forms[0], tiles[0])
    assert not table.exists()


def test_a_search_has_a_budget(
    op: Op,
    spec: Any,
    tiles: tuple[Tile, ...],
    table: Path,
    device: torch.device,
    clock: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choosing, "BUDGET_S", -1.0)
    # one candidate is always timed: the heuristic's
    assert choose(op, spec, 9, device, "search", clock(2)) == (op.forms[0], tiles[0])


def test_variants_of_a_gemm_share_an_entry(table: Path, device: torch.device, clock: Any) -> None:
    plain = LinearSpec(128, 64, 128, torch.bfloat16)
    few = dataclasses.replace(GEMM_PLAIN, candidates=lambda *args: GEMM_PLAIN.candidates(*args)[:3])
    op = dataclasses.replace(
        GEMM, forms=(few,), heuristic=lambda *args: (few, few.heuristic(*args))
    )
    tiles = few.candidates(plain, 2, device_key(device))
    assert choose(op, plain, 2, device, "search", clock(3, 2, 1)) == (few, tiles[2])
    other = LinearSpec(128, 64, 128, torch.float16, has_bias=True, has_residual=True)
    assert choose(op, other, 2, device, "search", clock()) == (few, tiles[2])
    per_channel = LinearSpec(128, 64, -1, torch.bfloat16)
    assert choose(op, per_channel, 2, device, "heuristic", clock()) == (few, tiles[0])


@pytest.mark.gpu
def test_search_on_the_device(table: Path, device: torch.device, clock: Any) -> None:
    spec = LinearSpec(4096, 4096, 128, torch.bfloat16)
    form, tile = choose(GEMM, spec, 16, device, "search")
    assert tile in form.candidates(spec, 16, device_key(device))
    assert choose(GEMM, spec, 16, device, "search", clock()) == (form, tile)
