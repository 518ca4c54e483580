"""`qoqc inspect`: what the passes made, or would make, of a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from qoqc.artifact.kernel_sources import devices
from qoqc.artifact.launches import summary
from qoqc.artifact.manifest import Manifest, graph_entry, is_artifact
from qoqc.artifact.report import report
from qoqc.artifact.survey import Survey, survey
from qoqc.cli.progress import steps
from qoqc.cli.record import show_artifact
from qoqc.cli.source import choose_device, choose_dtype, load_model, prepare
from qoqc.config import Options
from qoqc.errors import OptionError, Unsupported
from qoqc.passes.structure.describe import COLUMNS, layer_rows, stream_line
from qoqc.passes.structure.discover import structure_of
from qoqc.passes.structure.facts import ModelStructure
from qoqc.runtime.weights import STORE


def run(
    model_name: str,
    raw_options: Mapping[str, Any],
    *,
    device: str,
    dtype: str,
    html: str | None = None,
) -> None:
    """Print the model, its structure, counts by pass, what is left in 16 bit, and the sizes.

    html  a file to write a page about an artifact to
    """
    options = Options.parse(raw_options)
    where, kind = choose_device(device), choose_dtype(dtype)
    if is_artifact(Path(model_name)):
        _artifact(Path(model_name))
        if html is not None:
            manifest = Manifest.read(Path(model_name))
            listings = {
                str(path.relative_to(model_name)): path.read_text(encoding="utf-8")
                for path in manifest.listings(Path(model_name))
            }
            page = report(manifest, Path(model_name).resolve().name, listings)
            Path(html).write_text(page, encoding="utf-8")
            print(f"{html}: the same as a page")
        return
    if html is not None:
        raise OptionError(f"--html: {model_name} is not an artifact; make one by qoqc compile")
    prepare()
    with steps() as shown:
        shown.start(f"Loading {model_name}")
        model = load_model(model_name, where, kind)
        shown.start("Reading its structure")
        structure = _structure(model)
        shown.start("Packing weights")
        found = survey(model, options, shown.update)
    before, after = _sizes(model, found)
    graphs = [graph_entry(report) for report in found.reports]
    print(f"{model_name}: {type(model).__name__}")
    _show_structure(structure)
    _show(len(found.weights), graphs, before, after)
    _show_launches({"device": devices(where)[-1].name, "layers": summary(found.launches)})


def _show_launches(found: Mapping[str, Any] | None) -> None:
    """What a decode step launches, as a manifest has it; of other graphs nothing."""
    if found is not None:
        print(f"a decode step of one sequence on {found['device']}:")
        for line in found["layers"]:
            print(f"  {line}")


def size(count: int) -> str:
    """A byte count as a person reads it: `8.0 MB`."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def _artifact(directory: Path) -> None:
    """From the manifest alone, with the options it was made with; its files are verified."""
    manifest = Manifest.read(directory)
    count = manifest.verify(directory)
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    title = f"{directory}: {manifest.architecture}, {count} files verified"
    print(title)
    _show(
        len(manifest.weights),
        manifest.graphs,
        manifest.bytes_before,
        manifest.bytes_after,
    )
    for graph in manifest.graphs:
        _show_launches(graph.get("launches"))
    for path in manifest.listings(directory):
        print(f"the graph behind the passes: {path}")
    show_artifact(manifest, str(directory))
    print("options:", ", ".join(f"{name}={value}" for name, value in manifest.options.items()))
    print("made with:", versions)


def _sizes(model: Any, found: Survey) -> tuple[int, int]:
    """Bytes of all parameters, and of what an artifact would hold instead."""
    tensors = {id(t): t for t in model.state_dict(keep_vars=True).values()}
    before = sum(_bytes(t) for t in tensors.values())
    after = before
    for ref in found.weights:
        packed = STORE.packed(ref.param)
        assert packed is not None, "survey() packs every weight it names"
        after += sum(map(_bytes, packed.tensors().values())) - _bytes(ref.param)
    return before, after


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _structure(model: Any) -> ModelStructure | str:
    """The structure, or why there is none: a model may be packed all the same."""
    try:
        return structure_of(model)
    except Unsupported as error:
        return str(error)


def _show_structure(structure: ModelStructure | str) -> None:
    if isinstance(structure, str):
        print(f"structure: {structure}")
        return
    print(f"residual stream: {stream_line(structure)}")
    table = Table(*COLUMNS)
    for row in layer_rows(structure):
        table.add_row(*row)
    Console(highlight=False).print(table)
    for problem in (*structure.stream.problems, *structure.problems):
        print(f"  {problem}")


def _show(packed: int, graphs: list[dict[str, Any]], before: int, after: int) -> None:
    # a row for each pass: there are too many for the columns of a terminal
    table = Table("pass", *(graph["graph"] for graph in graphs))
    for name in graphs[0]["counts"]:
        table.add_row(name, *(str(graph["counts"][name]) for graph in graphs))
    Console(highlight=False).print(table)
    reasons = {(r["name"], r["reason"]): None for graph in graphs for r in graph["refusals"]}
    print(f"{packed} linears in 4 bit, {len(reasons)} left in 16 bit")
    for name, reason in reasons:
        print(f"  {name}: {reason}")
    print(f"weights: {size(before)} -> {size(after)}")
