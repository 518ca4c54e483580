"""A record comes back as it was written, or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qoqc.records.files import Input, Record, Weight, read, write

KEY = "0123"
RECORD = Record(
    inputs=[
        Input("L['kwargs']['input_ids'].size()[1]", "s0", None, "int"),
        Input("L['kwargs']['input_ids']", "", ["1", "s0"], "torch.int64"),
    ],
    bound=[("torch.int8", [8, 128])],
    weights=[Weight(["L['self'].weight"], ["weight"], [False], False, True, 128, [(0, "int8")])],
    guards=["s0 <= 4096"],
    ranges={"s0": (2, None)},
)
CODE = bytes(range(200))


def test_round_trip(tmp_path: Path) -> None:
    assert read(tmp_path, KEY) is None
    write(tmp_path, KEY, RECORD, CODE)
    found = read(tmp_path, KEY)
    assert found is not None
    assert found[1] == CODE
    # JSON has lists for tuples
    assert json.dumps(found[0].__dict__, default=vars) == json.dumps(RECORD.__dict__, default=vars)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{KEY}.code", f"{KEY}.json"]


@pytest.mark.parametrize("name", [f"{KEY}.json", f"{KEY}.code"])
def test_every_flipped_byte_is_noticed(tmp_path: Path, name: str) -> None:
    write(tmp_path, KEY, RECORD, CODE)
    path = tmp_path / name
    sound = path.read_bytes()
    for place in range(len(sound)):
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
        with pytest.raises(ValueError):
            read(tmp_path, KEY)
    for length in (0, 1, len(sound) // 2, len(sound) - 1):
        path.write_bytes(sound[:length])
        with pytest.raises(ValueError):
            read(tmp_path, KEY)


def test_swapped_files_are_noticed(tmp_path: Path) -> None:
    write(tmp_path, "a", RECORD, CODE)
    write(tmp_path, "b", RECORD, CODE[::-1])
    (tmp_path / "a.code").rename(tmp_path / "other")
    (tmp_path / "b.code").rename(tmp_path / "a.code")
    with pytest.raises(ValueError, match="another"):
        read(tmp_path, "a")
    (tmp_path / "a.json").write_bytes((tmp_path / "b.json").read_bytes())
    with pytest.raises(ValueError, match="another"):
        read(tmp_path, "a")


def test_half_a_record_is_none(tmp_path: Path) -> None:
    write(tmp_path, KEY, RECORD, CODE)
    (tmp_path / f"{KEY}.code").unlink()
    assert read(tmp_path, KEY) is None
