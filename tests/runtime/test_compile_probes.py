"""Trials of the C++ compiler that went well are not repeated, all others are."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from torch._inductor import cpu_vec_isa
from torch._inductor.cpu_vec_isa import VecAVX2, VecAVX512, VecISA

from qoqc.runtime import compile_probes


def test_torch_still_has_what_is_replaced() -> None:
    """Before qoqc patches it, in a torch of the supported range."""
    assert list(inspect.signature(VecISA.check_build).parameters) == ["self", "code"]
    assert cpu_vec_isa._get_isa_dry_compile_fingerprint("-mavx2")
    assert "check_build" in inspect.getsource(vars(VecISA)["_VecISA__bool__impl"].__wrapped__)


class Compiler:
    """Stands for Inductor's trial: counts, and answers as it is told."""

    def __init__(self, works: bool) -> None:
        self.works, self.tried = works, 0

    def check_build(self, isa: VecISA, code: str) -> bool:
        self.tried += 1
        return self.works


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Compiler:
    found = Compiler(works=True)
    monkeypatch.setattr(VecISA, "check_build", lambda isa, code: found.check_build(isa, code))
    monkeypatch.setattr(compile_probes, "_PLACE", [])
    compile_probes._patch.__wrapped__()
    compile_probes.keep_in(tmp_path)
    return found


def test_a_trial_that_went_well_is_made_once(compiler: Compiler, tmp_path: Path) -> None:
    isa = VecAVX2()
    assert isa.check_build("code") and isa.check_build("code")
    assert compiler.tried == 1
    # by what is compiled, for which instructions
    assert isa.check_build("other code") and VecAVX512().check_build("code")
    assert compiler.tried == 3
    compile_probes.keep_in(tmp_path / "of another key")
    assert isa.check_build("code")
    assert compiler.tried == 4


def test_flags_that_are_tried_are_part_of_it(compiler: Compiler) -> None:
    isa = VecAVX512()
    assert isa.check_build("code")
    isa._arch_flags += " -mavx512bf16"
    assert isa.check_build("code")
    assert compiler.tried == 2


def test_another_compiler_is_tried(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_probes, "_get_isa_dry_compile_fingerprint", "g++ 12={}".format)
    assert VecAVX2().check_build("code")
    monkeypatch.setattr(compile_probes, "_get_isa_dry_compile_fingerprint", "g++ 13={}".format)
    assert VecAVX2().check_build("code")
    assert compiler.tried == 2


def test_a_trial_that_failed_is_repeated(compiler: Compiler) -> None:
    compiler.works = False
    assert not VecAVX2().check_build("code")
    compiler.works = True
    assert VecAVX2().check_build("code")
    assert compiler.tried == 2
