"""The tuning tables: the user's, which searches write, those of artifacts, and those shipped.

The user's is `<cache_dir>/tuning.json`; an artifact's are in its folder qoqc/tuning; shipped ones
are codegen/tables/*.json. All are lists a person can read and edit. An entry counts only on the
device it names, while its form runs there and its tile is among the form's candidates, so an edit
cannot make a kernel illegal.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import logging
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from qoqc.codegen.family import Family, Op, Tile
from qoqc.config import cache_dir
from qoqc.log import get_logger
from qoqc.runtime.device import DeviceKey

if TYPE_CHECKING:  # in Python 3.10 it lives elsewhere
    from importlib.resources.abc import Traversable

log = get_logger("tune")

VERSION = 2

MAX_BYTES = 16 << 20
"""Of a table, which may come from anywhere; an entry takes 300."""

KEY = ("op", "spec", "device", "size")

Table = dict[str, tuple[str, Tile]]
"""Names of forms and their tiles, by `entry_key`."""

_TABLES: dict[Path, Table] = {}
_SHIPPED: dict[str, Table] = {}
_ADOPTED: dict[Path, Table] = {}
"""The tables of each artifact by its directory, the one adopted last at the end."""

_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


def entry_key(op: Op, spec: Any, size: int, device: DeviceKey) -> str:
    """The key of a table entry: JSON of everything the choice depends on."""
    parts = {
        "op": op.name,
        "spec": op.table_spec(spec),
        "device": dataclasses.asdict(device),
        "size": size,
    }
    return json.dumps(parts, sort_keys=True)


def look_up(op: Op, spec: Any, size: int, device: DeviceKey) -> tuple[Family, Tile] | None:
    """The winner that the user's table knows, else an artifact's, else the shipped: if legal."""
    return own(op, spec, size, device) or _legal(shipped(), op, spec, size, device)


def own(op: Op, spec: Any, size: int, device: DeviceKey) -> tuple[Family, Tile] | None:
    """The same without the shipped table: what was searched for, here or for an artifact."""
    for table in (_user_table(), *reversed(_ADOPTED.values())):
        found = _legal(table, op, spec, size, device)
        if found is not None:
            return found
    return None


def adopt(artifact: Path, files: Iterable[Path]) -> None:
    """Take winners from the tables of an artifact as well, before those of one adopted earlier.

    A damaged one is ignored with a warning, a missing one without.
    """
    tables = [_read(path) for path in files]
    _ADOPTED.pop(artifact, None)
    _ADOPTED[artifact] = {key: found for table in tables for key, found in table.items()}


def _legal(
    table: Table, op: Op, spec: Any, size: int, device: DeviceKey
) -> tuple[Family, Tile] | None:
    key = entry_key(op, spec, size, device)
    if key in table:
        name, tile = table[key]
        for form in op.usable(spec, device):
            if form.name == name and tile in form.candidates(spec, size, device):
                return form, tile
        log.info("%s: an entry of a tuning table is not legal: %s %s", op.name, name, tile)
    return None


def record(key: str, form: Family, tile: Tile) -> None:
    """Add a winner to the table of every process that shares the cache directory."""
    path = table_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        # read again: another process may have added to it; _user_table() has warned of damage
        known = _user_table()
        _TABLES[path] = {**_read(path, logging.DEBUG), **known, key: (form.name, tile)}
        write(path, _TABLES[path])


def table_path() -> Path:
    """Where the user's winners are kept."""
    return cache_dir() / "tuning.json"


def write(path: Path, table: Table) -> None:
    """Replace the file `path` by the text of `table`: readers see the old or the new, whole."""
    entries = [
        {
            **json.loads(key),
            "form": form,
            "tile": {
                "constexprs": dict(tile.constexprs),
                "num_warps": tile.num_warps,
                "num_stages": tile.num_stages,
            },
        }
        for key, (form, tile) in sorted(table.items())
    ]
    # an entry per line: an indented one would take twenty
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    text = f'{{"version": {VERSION}, "entries": [\n{lines}\n]}}\n'
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def shipped() -> Table:
    """The entries of all tables in the package."""
    folder = importlib.resources.files("qoqc.codegen") / "tables"
    if str(folder) not in _SHIPPED:
        files = [file for file in folder.iterdir() if file.name.endswith(".json")]
        tables = [_read(file) for file in sorted(files, key=lambda file: file.name)]
        _SHIPPED[str(folder)] = {key: found for table in tables for key, found in table.items()}
    return _SHIPPED[str(folder)]


def _user_table() -> Table:
    path = table_path()
    if path not in _TABLES:
        _TABLES[path] = _read(path)
    return _TABLES[path]


def _read(path: Traversable, level: int = logging.WARNING) -> Table:
    """The table in a file; an empty one, with a line in the log, where it is damaged or foreign."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES} bytes")
        raw = json.loads(content)
        if raw["version"] != VERSION:
            raise ValueError(f"version {raw['version']}, expected {VERSION}")
        return {
            json.dumps({name: entry[name] for name in KEY}, sort_keys=True): (
                str(entry["form"]),
                _tile(entry["tile"]),
            )
            for entry in raw["entries"]
        }
    except FileNotFoundError:
        return {}
    except _DAMAGE as error:
        log.log(level, "%s is ignored, its tiles are not used: %r", path, error)
        return {}


def _tile(raw: dict[str, Any]) -> Tile:
    constexprs = tuple((str(name), int(value)) for name, value in raw["constexprs"].items())
    return Tile(constexprs, int(raw["num_warps"]), int(raw["num_stages"]))
