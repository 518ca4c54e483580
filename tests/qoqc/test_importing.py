"""Imports without the garbage collector: it is on again afterwards, if it was before."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from qoqc.importing import without_collector


def test_the_collector_is_as_it_was() -> None:
    assert gc.isenabled()
    with pytest.raises(ModuleNotFoundError), without_collector():
        assert not gc.isenabled()
        raise ModuleNotFoundError
    assert gc.isenabled()
    gc.disable()
    try:
        with without_collector():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_program_freezes_what_it_imported() -> None:
    frozen = gc.get_freeze_count()
    with without_collector():
        pass
    assert gc.get_freeze_count() == frozen
    try:
        with without_collector(freeze=True):
            pass
        assert gc.get_freeze_count() > frozen
    finally:
        gc.unfreeze()


def test_a_library_freezes_nothing() -> None:
    program = "import qoqc, gc; qoqc.KV4Cache; print(gc.isenabled(), gc.get_freeze_count())"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.split() == ["True", "0"], result.stderr
