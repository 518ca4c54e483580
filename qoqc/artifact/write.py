"""The last files of an artifact: the card, and the manifest with the checksums of all others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from qoqc.artifact.card import card
from qoqc.artifact.folder import checksum, files_below
from qoqc.artifact.manifest import CARD, PATH, Manifest


def complete(
    manifest: Manifest, directory: Path, belongs: Callable[[str], bool] = lambda name: True
) -> Manifest:
    """Write card and manifest into `directory`, which has the rest; returns the manifest.

    belongs  says of a file name whether the file is part of the artifact
    """
    (directory / CARD).write_text(card(manifest))
    files = {
        name: checksum(path)
        for name, path in files_below(directory).items()
        if name != PATH and belongs(name)
    }
    manifest = dataclasses.replace(manifest, files=files)
    manifest.write(directory)
    return manifest
