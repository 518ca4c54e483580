"""Finished layers on disk: read back bit for bit, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qoqc.calibrate.checkpoint import Checkpoints, Finished, key_of, partial_directory
from qoqc.calibrate.recipe import LayerRecord, Recipe
from qoqc.errors import Unsupported
from qoqc.quant.weight import quantize_weight
from qoqc.testing import tiny_model

CPU = torch.device("cpu")


def finished() -> Finished:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(160, 96, generator=generator)
    record = LayerRecord("a.0", {"values": {"alpha": 0.3}}, ["a.0.o"], {"bits": 4}, {"a.0.w": 0.1})
    packed = {"a.0.w": quantize_weight(weight, 128), "a.0.c": quantize_weight(weight, -1)}
    return Finished(packed, {"a.0.norm": weight[0].clone()}, record)


def test_it_comes_back_as_it_was(tmp_path: Path) -> None:
    expected = finished()
    Checkpoints(tmp_path, "k").save(3, expected)
    found = Checkpoints(tmp_path, "k").load(3, CPU)
    assert found is not None
    assert found.record == expected.record
    assert found.packed.keys() == expected.packed.keys()
    for name, weight in expected.packed.items():
        assert found.packed[name].group_size == weight.group_size
        for part, tensor in weight.tensors().items():
            assert torch.equal(found.packed[name].tensors()[part], tensor)
    assert torch.equal(found.others["a.0.norm"], expected.others["a.0.norm"])
    assert list(found.others) == ["a.0.norm"]
    assert Checkpoints(tmp_path, "k").load(2, CPU) is None


def test_other_inputs_or_damage_count_as_none(tmp_path: Path) -> None:
    Checkpoints(tmp_path, "k").save(0, finished())
    assert Checkpoints(tmp_path, "other").load(0, CPU) is None
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-50])
    assert Checkpoints(tmp_path, "k").load(0, CPU) is None
    file.write_bytes(b"no safetensors")
    assert Checkpoints(tmp_path, "k").load(0, CPU) is None


@pytest.mark.parametrize("change", ["weight", "windows", "recipe", "names", "versions"])
def test_the_key_changes_with_every_input(change: str) -> None:
    def key(changed: str) -> str:
        model = tiny_model("llama")
        windows = torch.arange(8).view(2, 4)
        if changed == "weight":
            with torch.no_grad():
                model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
        if changed == "windows":
            windows[0, 0] += 1
        recipe = Recipe(seed=1) if changed == "recipe" else Recipe()
        names = ["a"] if changed == "names" else ["a", "b"]
        versions = {"torch": "0"} if changed == "versions" else {"torch": "1"}
        return key_of(model, windows, recipe, names, versions)

    assert key("") == key("")
    assert key(change) != key("")


def test_the_directory_goes_unless_there_is_something_to_take_up(tmp_path: Path) -> None:
    def use(error: BaseException | None) -> Path:
        with partial_directory(tmp_path / "new" / "out") as directory:
            (directory / "layer").touch()
            if error is not None:
                raise error
        return directory

    place = tmp_path / "new" / "out.partial"
    with pytest.raises(KeyboardInterrupt):
        use(KeyboardInterrupt())
    assert (place / "layer").exists()
    with pytest.raises(Unsupported):
        use(Unsupported("no"))
    assert not place.exists()
    assert not use(None).exists()


def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    target: Any = tmp_path / "file" / "out"
    with pytest.raises(OSError, match="file"), partial_directory(target):
        pass
