"""Random damage to an artifact: an error that names it, or the same logits. Never anything else.

Each case is made from its number alone: `pytest -k "damage and 17"` repeats case 17.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qoqc.artifact.checked import Shard
from qoqc.artifact.folder import checksum, files_below
from qoqc.artifact.load import load_model
from qoqc.artifact.manifest import ASIDE, FORMAT, KERNELS, PATH, Manifest, _digest
from qoqc.artifact.save import save
from qoqc.errors import QoqcError
from qoqc.testing import tiny_model

TOKENS = torch.tensor([[1, 3, 56, 207, 302]])
SECONDS = 60
"""What hangs is ended after so long; a case takes a second at most."""

QUICK, ALL = 100, 1000

Damage = Callable[[Path, random.Random], None]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A small artifact in two weight files, and its logits."""
    directory = tmp_path_factory.mktemp("artifact") / "tiny"
    model = tiny_model("llama", torch.bfloat16, num_hidden_layers=1)
    save(model, directory, max_shard_size=100_000)
    loaded, _ = load_model(directory)
    assert len(Manifest.read(directory).shards) > 1
    return directory, logits(loaded)


@pytest.fixture(autouse=True)
def _alarm() -> Iterator[None]:
    def ring(*args: Any) -> None:
        raise TimeoutError(f"hung for {SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS, use_cache=False).logits
    return found


def own(directory: Path) -> Any:
    return load_model(directory)[0]


def transformers(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory)


def some_file(directory: Path, rng: random.Random) -> Path:
    """Any file; the manifest, the config and the weights more often."""
    files = files_below(directory)
    important = [path for name, path in files.items() if not name.startswith(ASIDE)]
    return rng.choice(important if rng.random() < 0.8 else list(files.values()))


def flip(directory: Path, rng: random.Random) -> None:
    path = some_file(directory, rng)
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 2, 20])):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def truncate(directory: Path, rng: random.Random) -> None:
    path = some_file(directory, rng)
    content = path.read_bytes()
    path.write_bytes(content[: rng.choice([0, 1, 7, 8, rng.randrange(len(content))])])


def lengthen(directory: Path, rng: random.Random) -> None:
    path = some_file(directory, rng)
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.choice([1, 8, 5000])))


def overwrite(directory: Path, rng: random.Random) -> None:
    path = some_file(directory, rng)
    content = bytearray(path.read_bytes())
    start = rng.randrange(len(content))
    length = min(rng.choice([4, 512, 4096]), len(content) - start)
    content[start : start + length] = rng.choice([bytes(length), rng.randbytes(length)])
    path.write_bytes(content)


def remove(directory: Path, rng: random.Random) -> None:
    some_file(directory, rng).unlink()


def swap(directory: Path, rng: random.Random) -> None:
    first, second = some_file(directory, rng), some_file(directory, rng)
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)


def foreign_kernel(directory: Path, rng: random.Random) -> None:
    """Code that would be noticed if it ran, in place of a kernel and beside it."""
    code = "raise SystemExit('foreign code ran')\n"
    path = rng.choice(sorted((directory / KERNELS).iterdir()))
    rng.choice([path, path.with_name("sitecustomize.py"), directory / "modeling_x.py"]).write_text(
        code
    )


def another_kind(directory: Path, rng: random.Random) -> None:
    """A directory, a dangling link or a device where a file was."""
    path = some_file(directory, rng)
    path.unlink()
    kind = rng.randrange(3)
    if kind == 0:
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == 1 else "nowhere")


def huge_json(directory: Path, rng: random.Random) -> None:
    name = rng.choice([PATH, "config.json", "model.safetensors.index.json"])
    path = directory / name
    kind = rng.randrange(3)
    if kind == 0:
        path.write_text("[" * 200_000)
    elif kind == 1:
        path.write_text('{"a": ' * 50_000 + "1" + "}" * 50_000)
    else:
        path.write_text(f'{{"format": {FORMAT}, "digest": {"9" * 20_000}}}')


def reseal(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest and renew its digest, as a person who means harm would."""
    body = json.loads((directory / PATH).read_text())
    del body["digest"]
    change(body)
    (directory / PATH).write_text(json.dumps({"digest": _digest(body), **body}))


def wrong_entry(directory: Path, rng: random.Random) -> None:
    """A manifest that is what it claims, with a value of another type or size in it."""
    bad: list[Any] = [None, -1, 0, 2**31, 2**70, 1.5, "", "../../x", "x" * 10_000, [], [[]], {}]
    bad += [True, {"a": 1}, ["a"], "\0", "__class__", "/dev/zero"]

    def change(body: dict[str, Any]) -> None:
        owner: Any = body
        key: Any = rng.choice(
            [
                "architecture",
                "options",
                "weights",
                "tensors",
                "aliases",
                "files",
                "shards",
                "graphs",
            ]
        )
        while isinstance(owner[key], (dict, list)) and owner[key] and rng.random() < 0.8:
            owner = owner[key]
            key = rng.choice(list(owner)) if isinstance(owner, dict) else rng.randrange(len(owner))
        if isinstance(owner, dict) and rng.random() < 0.3:
            owner[str(rng.choice(bad))] = owner.pop(key)
        else:
            owner[key] = rng.choice(bad)

    reseal(directory, change)


def wrong_header(directory: Path, rng: random.Random) -> None:
    """A weight file whose header lies, with checksums that fit."""
    path = rng.choice(sorted(directory.glob("*.safetensors")))
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    kind = rng.randrange(6)
    if kind == 0:
        prefix = struct.pack("<Q", rng.choice([2**63, 2**40, 10**8, len(content), 0]))
        path.write_bytes(prefix + content[8:])
    else:
        name = rng.choice([key for key in header if key != "__metadata__"])
        if kind == 1:
            header[name]["data_offsets"] = rng.choice([[0, 2**62], [-1, 4], [9, 3], [0], "x", None])
        elif kind == 2:
            header[name]["shape"] = rng.choice([[2**40], [2**32, 2**32], [-1], ["1"], {}, [0]])
        elif kind == 3:
            header[name]["dtype"] = rng.choice(["F64", "Q4", "", None, "BOOL", "I64"])
        elif kind == 4:
            del header[name]
        else:
            header[f"{name}x"] = header[name]
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)

    def seal(body: dict[str, Any]) -> None:
        body["files"][path.name] = checksum(path)
        try:
            shard = Shard.of(path)
        except ValueError:  # not even a header: the old entry stays
            return
        body["shards"][path.name] = {"size": shard.size, "header": shard.header}

    reseal(directory, seal)


KINDS: tuple[Damage, ...] = (
    flip,
    truncate,
    lengthen,
    overwrite,
    remove,
    swap,
    foreign_kernel,
    another_kind,
    huge_json,
    wrong_entry,
    wrong_header,
)
RESEALED = (wrong_entry, wrong_header)


def check(saved: tuple[Path, torch.Tensor], scratch: Path, number: int) -> str:
    """Do the damage of one case and load; returns what came of it, fails if it may not."""
    directory, expected = saved
    rng = random.Random(number)
    kind = KINDS[number % len(KINDS)]
    copy = scratch / str(number)
    shutil.copytree(directory, copy)
    kind(copy, rng)
    # transformers would read a device to its end, before it asks anybody
    load = own if kind is another_kind else rng.choice([own, transformers])
    damaged = changed(directory, copy)
    try:
        model = load(copy)
    except QoqcError as error:
        assert "\n" not in str(error), f"case {number}, {kind.__name__}: more than a line"
        outcome = "error"
    except Exception:
        # transformers reads config.json and the index before it asks anybody
        early = {"config.json", "model.safetensors.index.json"} & damaged
        lost = load is transformers and (early or any("safetensors" in name for name in damaged))
        assert lost, f"case {number}, {kind.__name__}, {damaged}"
        outcome = "error of transformers"
    else:
        same = torch.equal(logits(model), expected)
        # whoever renews the digests can store another model, but not another one's logits here
        assert same, f"case {number}, {kind.__name__}, {damaged}: other logits"
        outcome = "same logits"
    shutil.rmtree(copy)
    return outcome


def changed(directory: Path, copy: Path) -> set[str]:
    before = files_below(directory)
    return {
        name
        for name, path in before.items()
        if not (copy / name).is_file()
        or (copy / name).is_char_device()
        or (copy / name).read_bytes() != path.read_bytes()
    }


@pytest.mark.parametrize("number", range(QUICK))
def test_damage(saved: tuple[Path, torch.Tensor], tmp_path: Path, number: int) -> None:
    assert check(saved, tmp_path, number)


@pytest.mark.slow
def test_much_damage(saved: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    outcomes: dict[str, int] = {}
    for number in range(QUICK, ALL):
        signal.alarm(SECONDS)
        outcome = check(saved, tmp_path, number)
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    assert outcomes["error"] > (ALL - QUICK) / 2, outcomes


def test_sound_artifacts_load(saved: tuple[Path, torch.Tensor]) -> None:
    for load in (own, transformers):
        assert torch.equal(logits(load(saved[0])), saved[1])
