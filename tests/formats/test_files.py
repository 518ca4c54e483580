"""Finding tensors: shards, pickles without code, and every kind of bad file by its name."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qoqc.errors import Unsupported
from qoqc.formats.files import TensorFiles

A, B = torch.arange(6.0).view(2, 3), torch.ones(4, dtype=torch.int8)


class Bomb:
    """Pickled, a call; unpickled by a reader that runs code, a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (Path.touch, (self.mark,))


def index(directory: Path, mapping: dict[str, str], stem: str = "model.safetensors") -> None:
    (directory / f"{stem}.index.json").write_text(json.dumps({"weight_map": mapping}))


def two_shards(directory: Path) -> None:
    save_file({"a": A}, directory / "model-1.safetensors")
    save_file({"b": B}, directory / "model-2.safetensors")
    index(directory, {"a": "model-1.safetensors", "b": "model-2.safetensors"})


def contents(directory: Path) -> dict[str, torch.Tensor]:
    with TensorFiles(directory) as files:
        return {name: files.get(name) for name in files.names}


def one_pickle(directory: Path) -> None:
    torch.save({"a": A, "b": B}, directory / "pytorch_model.bin")


def shards_of_pickles(directory: Path) -> None:
    torch.save({"a": A}, directory / "pytorch_model-1.bin")
    torch.save({"b": B}, directory / "pytorch_model-2.bin")
    mapping = {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}
    index(directory, mapping, "pytorch_model.bin")


def one_file(directory: Path) -> None:
    save_file({"a": A, "b": B}, directory / "model.safetensors")
    (directory / "pytorch_model.bin").write_bytes(b"not looked at where there is a safetensors")


@pytest.mark.parametrize("write", [two_shards, one_pickle, shards_of_pickles, one_file])
def test_all_tensors_are_found(write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path)
    found = contents(tmp_path)
    assert found.keys() == {"a", "b"}
    assert torch.equal(found["a"], A)
    assert torch.equal(found["b"], B)


def test_tensors_outlive_the_files(tmp_path: Path) -> None:
    two_shards(tmp_path)
    found = contents(tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    assert torch.equal(found["a"], A)


def test_only_the_files_of_the_index_are_read(tmp_path: Path) -> None:
    two_shards(tmp_path)
    (tmp_path / "other.safetensors").write_bytes(b"junk")
    assert contents(tmp_path).keys() == {"a", "b"}


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    torch.save({"a": A, "b": Bomb(mark)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Unsupported, match=r"pytorch_model\.bin is a pickle with more than tensors"):
        contents(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(mark), protocol=2))
    with pytest.raises(Unsupported, match=r"pytorch_model\.bin"):
        contents(tmp_path)
    assert not mark.exists()


def not_a_state_dict(directory: Path) -> str:
    torch.save({"model": {"a": A}}, directory / "model.bin")
    return "model.bin is not a state dict"


def empty(directory: Path) -> str:
    return "holds no tensors"


def cut_safetensors(directory: Path) -> str:
    two_shards(directory)
    path = directory / "model-2.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return "model-2.safetensors is damaged"


def cut_pickle(directory: Path) -> str:
    one_pickle(directory)
    path = directory / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-40])
    return "pytorch_model.bin"


def huge_header(directory: Path) -> str:
    (directory / "model.safetensors").write_bytes(b"\xff" * 7 + b"\x7f{}")
    return "model.safetensors is damaged"


def missing_shard(directory: Path) -> str:
    two_shards(directory)
    (directory / "model-2.safetensors").unlink()
    return "names the file 'model-2.safetensors', which is not in"


def broken_promise(directory: Path) -> str:
    two_shards(directory)
    index(directory, {"a": "model-2.safetensors", "b": "model-2.safetensors"})
    return "model-2.safetensors lacks a"


def file_elsewhere(directory: Path) -> str:
    inner = directory.parent / "elsewhere.safetensors"
    save_file({"a": A}, inner)
    index(directory, {"a": "../elsewhere.safetensors"})
    return r"names the file '\.\./elsewhere.safetensors'"


def index_of_nonsense(directory: Path) -> str:
    (directory / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}')
    return "model.safetensors.index.json is damaged"


def twice(directory: Path) -> str:
    save_file({"a": A}, directory / "one.safetensors")
    save_file({"a": A}, directory / "two.safetensors")
    return "both one.safetensors and two.safetensors hold a"


@pytest.mark.parametrize(
    "spoil",
    [
        not_a_state_dict,
        empty,
        cut_safetensors,
        cut_pickle,
        huge_header,
        missing_shard,
        broken_promise,
        file_elsewhere,
        index_of_nonsense,
        twice,
    ],
)
def test_bad_files_are_named(spoil: Callable[[Path], str], tmp_path: Path) -> None:
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    with pytest.raises(Unsupported, match=spoil(directory)):
        contents(directory)


@pytest.mark.filterwarnings("ignore")  # torch warns of odd pickle protocols, which these are
@pytest.mark.parametrize("zipped", [True, False])
def test_any_damage_to_a_pickle_is_an_error_or_leaves_tensors(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": A, "b": B}, path, _use_new_zipfile_serialization=zipped)
    good, chance = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(200):
        spoiled = bytearray(good)
        for _ in range(3):
            spoiled[chance.randrange(len(spoiled))] ^= 1 << chance.randrange(8)
        path.write_bytes(bytes(spoiled))
        try:
            found = contents(tmp_path)
        except Unsupported:
            refused += 1
        else:
            assert all(isinstance(tensor, torch.Tensor) for tensor in found.values())
    assert refused > 100


def test_what_is_no_directory(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="nowhere is not a directory"):
        contents(tmp_path / "nowhere")


def test_take_checks_type_shape_and_values(tmp_path: Path) -> None:
    save_file({"a": A, "nan": torch.tensor([1.0, torch.nan])}, tmp_path / "x.safetensors")
    with TensorFiles(tmp_path) as files:
        assert torch.equal(files.take("a", (torch.float32,), (2, None)), A)
        for dtype, shape in (
            (torch.float16, (2, 3)),
            (torch.float32, (3, 2)),
            (torch.float32, (6,)),
        ):
            with pytest.raises(Unsupported, match=r"x\.safetensors: a is float32 \[2, 3\]"):
                files.take("a", (dtype,), shape)
        with pytest.raises(Unsupported, match="nan holds NaN or infinite"):
            files.take("nan", (torch.float32,), (2,))
        with pytest.raises(Unsupported, match="the tensor b is missing"):
            files.take("b", (torch.float32,), (2,))
