"""A file of tensors: the values safetensors reads, in memory of their own, and no crash."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qoqc.artifact.tensor_file import Staging, TensorFile
from qoqc.errors import ArtifactError

CPU = torch.device("cpu")
TENSORS = {
    "bytes": torch.arange(1001, dtype=torch.uint8),
    "bf16": torch.randn(7, 33, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "fp32": torch.randn(5, 3, 2, generator=torch.Generator().manual_seed(1)),
    "bools": torch.tensor([[True], [False]]),
    "scalar": torch.tensor(-5),
    "none": torch.empty(0, 4),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


@pytest.mark.parametrize("staged", [None, 1, 64, 1 << 20])
def test_values_are_those_of_the_file(path: Path, staged: int | None) -> None:
    """For a device they pass through a buffer, which may be smaller than they are."""
    staging = None if staged is None else Staging(pinned=False, size=staged)
    file = TensorFile(path)
    assert sorted(file.names()) == sorted(TENSORS)
    # each of them by several threads at once: the place in the file is nobody's
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda name: file.read(name, CPU, staging), [*TENSORS] * 20))
    for tensor, expected in zip(found, [*TENSORS.values()] * 20, strict=True):
        assert tensor.dtype == expected.dtype
        assert tensor.shape == expected.shape
        assert torch.equal(tensor, expected)
    for name, expected in TENSORS.items():
        assert file.size(name) == expected.nbytes
        assert file.shape(name) == tuple(expected.shape)
    file.close()


def test_memory_is_aligned_and_outlives_the_file(path: Path) -> None:
    file = TensorFile(path)
    whole, part = file.read("bf16", CPU, None), file.part("bf16", slice(2, 5), CPU)
    file.close()
    path.write_bytes(bytes(path.stat().st_size))
    assert whole.data_ptr() % 64 == 0
    assert torch.equal(whole, TENSORS["bf16"])
    assert torch.equal(part, TENSORS["bf16"][2:5])


def test_a_file_cut_short_while_it_is_open_is_an_error(path: Path) -> None:
    file = TensorFile(path)
    with path.open("rb+") as handle:
        handle.truncate(path.stat().st_size - 1)
    with pytest.raises(ArtifactError, match="w.safetensors is damaged: it ends too early"):
        for name in TENSORS:
            file.read(name, CPU, None)
    file.close()


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\2\0\0\0\0\0\0\0[]", None])
def test_what_is_no_file_of_tensors(path: Path, content: bytes | None) -> None:
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArtifactError, match="w.safetensors is damaged"):
        TensorFile(path)


@pytest.mark.gpu
def test_values_on_a_gpu(path: Path) -> None:
    cuda = torch.device("cuda")
    staging = Staging(pinned=True, size=64)
    file = TensorFile(path)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda name: file.read(name, cuda, staging), [*TENSORS] * 20))
    for tensor, expected in zip(found, [*TENSORS.values()] * 20, strict=True):
        assert tensor.device.type == "cuda"
        assert torch.equal(tensor.cpu(), expected)
    assert file.part("bf16", slice(2, 5), cuda).device.type == "cuda"
    file.close()
