from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qoqc.codegen.build import OPS
from qoqc.codegen.family import Op, Tile, single
from qoqc.codegen.tuning import table as tables
from qoqc.codegen.tuning.choose import choose
from qoqc.codegen.tuning.table import entry_key, look_up, record, shipped
from qoqc.runtime.device import DeviceKey, device_key

H200 = DeviceKey("H200", 90, 132, 232448)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"version": 1, "winners": []}',
        b'{"version": 2, "winners": []}',
        b'{"version": 2, "entries": [{"op": "quantize"}]}',
        b'{"version": 2, "entries": [3]}',
        b'{"version": 2, "entries": 3}',
        b'{"version": 2, "entries": [{"op": 1, "spec": 1, "device": 1, "size": 1, "form": 1, '
        b'"tile": {"constexprs": [], "num_warps": 1, "num_stages": 1}}]}',
    ],
)
def test_a_damaged_table_is_ignored_with_one_warning(
    content: bytes,
    op: Op,
    spec: Any,
    tiles: tuple[Tile, ...],
    table: Path,
    device: torch.device,
    clock: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    table.write_bytes(content)
    with caplog.at_level(logging.WARNING, logger="qoqc"):
        assert choose(op, spec, 9, device, "search", clock(4, 3, 2, 1))[1] == tiles[3]
        assert choose(op, spec, 9, device, "search", clock())[1] == tiles[3]
    assert sum("tuning.json is ignored" in r.getMessage() for r in caplog.records) == 1
    assert len(json.loads(table.read_text())["entries"]) == 1


def test_winners_of_other_processes_are_kept(
    op: Op, spec: Any, tiles: tuple[Tile, ...], table: Path, forget: Callable[[], None]
) -> None:
    record(entry_key(op, spec, 1, H200), op.forms[0], tiles[0])
    ours = dict(tables._TABLES)
    forget()
    record(entry_key(op, spec, 2, H200), op.forms[0], tiles[0])
    tables._TABLES.update({path: {} for path in ours})
    record(entry_key(op, spec, 4, H200), op.forms[0], tiles[0])
    sizes = [entry["size"] for entry in json.loads(table.read_text())["entries"]]
    assert sorted(sizes) == [1, 2, 4]
    assert [path.name for path in table.parent.glob("tuning*.tmp")] == []


def test_a_failed_write_leaves_the_old_table(
    op: Op, spec: Any, tiles: tuple[Tile, ...], table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(entry_key(op, spec, 1, H200), op.forms[0], tiles[0])
    before = table.read_text()

    def full(source: str, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        record(entry_key(op, spec, 2, H200), op.forms[0], tiles[0])
    assert table.read_text() == before
    assert [path.name for path in table.parent.glob("tuning*.tmp")] == []


def test_the_key_tells_devices_apart(op: Op, spec: Any) -> None:
    assert entry_key(op, spec, 1, H200) != entry_key(
        op, spec, 1, dataclasses.replace(H200, sm_count=114)
    )


def test_an_entry_of_a_form_that_refuses_does_not_count(
    op: Op, spec: Any, tiles: tuple[Tile, ...], table: Path, device: torch.device
) -> None:
    key = device_key(device)
    picky = dataclasses.replace(op.forms[0], name="picky", refuses=lambda spec, device: "no")
    both = dataclasses.replace(op, forms=(*op.forms, picky))
    entry = entry_key(both, spec, 16, key)
    record(entry, picky, tiles[1])
    assert look_up(both, spec, 16, key) is None
    willing = dataclasses.replace(picky, refuses=lambda spec, device: None)
    both = dataclasses.replace(op, forms=(*op.forms, willing))
    assert look_up(both, spec, 16, key) == (willing, tiles[1])


def test_an_illegal_entry_of_the_user_does_not_hide_a_shipped_one(
    op: Op, spec: Any, tiles: tuple[Tile, ...], table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = entry_key(op, spec, 16, H200)
    record(entry, op.forms[0], dataclasses.replace(tiles[0], num_warps=32))
    monkeypatch.setattr(tables, "shipped", lambda: {entry: ("quantize", tiles[1])})
    assert look_up(op, spec, 16, H200) == (op.forms[0], tiles[1])


def test_shipped_tables_are_read_from_the_package(
    op: Op, spec: Any, tiles: tuple[Tile, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tables").mkdir()
    key = entry_key(op, spec, 16, H200)
    tables.write(tmp_path / "tables" / "a.json", {key: ("quantize", tiles[1])})
    (tmp_path / "tables" / "b.json").write_text("damaged")
    (tmp_path / "tables" / "README.md").write_text("no table")
    monkeypatch.setattr("importlib.resources.files", lambda _: tmp_path)
    assert shipped() == {key: ("quantize", tiles[1])}


def test_every_shipped_entry_is_legal() -> None:
    for key, (form, tile) in shipped().items():
        entry = json.loads(key)
        assert entry["op"] in OPS, key
        assert form in {family.name for family in OPS[entry["op"]].forms}, key
        assert tile.num_warps > 0


def test_refusals_are_logged_once(op: Op, spec: Any, caplog: pytest.LogCaptureFixture) -> None:
    form = dataclasses.replace(op.forms[0], name="shy", refuses=lambda *_: "it is not in the mood")
    with caplog.at_level(logging.INFO, logger="qoqc"):
        for _ in range(3):
            assert single(form).usable(spec, H200) == []
    told = [r.getMessage() for r in caplog.records if "in the mood" in r.getMessage()]
    assert told == ["shy is not used: it is not in the mood"]
