"""Records on disk: KEY.json says what goes into a graph and comes out, KEY.code is the graph.

They lie in the folder of compiled code, which only its owner can write to: the code is a pickle.
The text holds a checksum of itself and of the code, so that a damaged record is never used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from qoqc.runtime.weights import GroupSize


@dataclasses.dataclass(frozen=True)
class Input:
    """One argument of the compiled code: an integer, or a tensor with one formula per size.

    sizes  None for an integer, whose formula is `symbol`
    """

    source: str
    symbol: str
    sizes: list[str] | None
    dtype: str


@dataclasses.dataclass(frozen=True)
class Weight:
    """A bundle of packed weights: its Parameters, how they are packed, where its tensors go.

    fields  [index among the bound tensors, name of the bundle's tensor]
    """

    sources: list[str]
    names: list[str]
    transposed: list[bool]
    eight: bool
    glu: bool
    group_size: GroupSize
    fields: list[tuple[int, str]]


@dataclasses.dataclass(frozen=True)
class Record:
    """A compiled call.

    inputs  arguments of the code, in order, before the bound tensors
    bound   [dtype, sizes] of each packed tensor
    guards  formulas that hold for every size the code is right for
    ranges  least and largest value of each symbol (None: no bound)
    """

    inputs: list[Input]
    bound: list[tuple[str, list[int]]]
    weights: list[Weight]
    guards: list[str]
    ranges: dict[str, tuple[int, int | None]]


def write(folder: Path, key: str, record: Record, code: bytes) -> None:
    """Keep a record under its key; the text last, and each file at once."""
    body = {"key": key, "code": _checksum(code), "record": dataclasses.asdict(record)}
    text = json.dumps(body, sort_keys=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    _replace(folder / f"{key}.code", code)
    whole = json.dumps({"checksum": _checksum(text.encode()), "body": text})
    _replace(folder / f"{key}.json", whole.encode())


def read(folder: Path, key: str) -> tuple[Record, bytes] | None:
    """The record and its code; None if there is none. Raises ValueError if it is damaged."""
    try:
        whole = json.loads((folder / f"{key}.json").read_bytes())
        code = (folder / f"{key}.code").read_bytes()
    except FileNotFoundError:
        return None
    try:
        text = whole["body"]
        if whole["checksum"] != _checksum(text.encode()):
            raise ValueError("its checksum is another")
        body = json.loads(text)
        if body["key"] != key or body["code"] != _checksum(code):
            raise ValueError("its code is another's")
        return _record(body["record"]), code
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it has another form: {error!r}") from error


def _record(raw: dict[str, Any]) -> Record:
    return Record(
        [Input(**each) for each in raw["inputs"]],
        raw["bound"],
        [Weight(**each) for each in raw["weights"]],
        raw["guards"],
        raw["ranges"],
    )


def _checksum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _replace(path: Path, data: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as draft:
        draft.write(data)
    os.replace(draft.name, path)
