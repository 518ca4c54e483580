# Triton reads the annotations of jitted functions itself
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import ast
import textwrap
from typing import Any

import pytest
import triton
import triton.language as tl

from qoqc.codegen.decide import UNKNOWN, evaluate
from qoqc.codegen.prune import Pruner
from qoqc.codegen.specialize import choose_operands, drop_parameters, literal, specialize

LIMIT = tl.constexpr(7)
TEXT = tl.constexpr("one\ntwo")
ordinary = [1, 2]


@triton.jit
def innermost(x):
    """Calls nothing."""
    return x + LIMIT


@triton.jit
def helper(x):
    """Calls one more."""
    return innermost(x)


@triton.jit
def unused_helper(x):
    return x


@triton.jit(do_not_specialize=["M"])
def template(
    x_ptr,  # [M] input
    y_ptr,  # [M] output
    M,
    HAS_BIAS: tl.constexpr,
    SIZE: tl.constexpr,
    KIND: tl.constexpr,  # what to do
):
    """Docstring stays.

    In two paragraphs.
    """
    # why this is here
    offs = tl.arange(0, SIZE)
    x = tl.load(x_ptr + offs, mask=offs < M, other=0)
    if HAS_BIAS:
        # bias comment
        x += 1
        if KIND == 2 and not SIZE > 100:
            x = unused_helper(x)
    elif KIND is None:
        x += 2
    else:
        x += 3
    tl.store(y_ptr + offs, helper(x), mask=offs < M)


@triton.jit
def bad_global(x, FLAG: tl.constexpr):
    if FLAG:
        x += ordinary[0]
    tl.store(x, 1)


@triton.jit
def overwrites(x, FLAG: tl.constexpr):
    FLAG = 3
    tl.store(x, FLAG)


def pruned(body: str, **values: Any) -> str:
    source = "def f(a, b):\n" + textwrap.indent(textwrap.dedent(body).strip("\n"), "    ")
    head, text = Pruner(source, values).function()
    ast.parse(f"{head}\n{text}")
    return textwrap.dedent(text)


def expected(text: str) -> str:
    return textwrap.dedent(text).strip("\n")


def test_module_holds_only_what_the_live_branches_use() -> None:
    text = specialize(template, {"HAS_BIAS": False, "SIZE": 16, "KIND": None})
    assert text.startswith("import torch\nimport triton\nimport triton.language as tl\n\nLIMIT = ")
    assert "x += 2" in text
    assert "unused_helper" not in text
    assert "HAS_BIAS" not in text
    assert "KIND" not in text
    assert text.index("def innermost") < text.index("def helper") < text.index("def template")
    assert text.count("def ") == 3


def test_text_of_the_template() -> None:
    text = specialize(template, {"HAS_BIAS": True, "SIZE": 16, "KIND": 2})
    want = '''
    @triton.jit(do_not_specialize=["M"])
    def template(
        x_ptr,  # [M] input
        y_ptr,  # [M] output
        M,
    ):
        """Docstring stays.

        In two paragraphs.
        """
        SIZE: tl.constexpr = 16
        # why this is here
        offs = tl.arange(0, SIZE)
        x = tl.load(x_ptr + offs, mask=offs < M, other=0)
        # bias comment
        x += 1
        x = unused_helper(x)
        tl.store(y_ptr + offs, helper(x), mask=offs < M)
    '''
    assert text.endswith(expected(want).rstrip() + "\n")


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("kind", [1, 2, None])
def test_every_binding_parses_and_keeps_one_branch(has_bias: bool, kind: int | None) -> None:
    text = specialize(template, {"HAS_BIAS": has_bias, "SIZE": 16, "KIND": kind})
    ast.parse(text)
    kept = [step for step in ("x += 1", "x += 2", "x += 3") if step in text]
    assert kept == ["x += 1"] if has_bias else ["x += 2" if kind is None else "x += 3"]


def test_missing_and_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"missing \['SIZE'\], unknown \['SIZES'\]"):
        specialize(template, {"HAS_BIAS": True, "SIZES": 16, "KIND": 2})


def test_a_global_the_module_cannot_hold_is_refused_where_it_is_used() -> None:
    assert "ordinary" not in specialize(bad_global, {"FLAG": False})
    with pytest.raises(ValueError, match="bad_global uses the global ordinary"):
        specialize(bad_global, {"FLAG": True})


def test_assigning_to_a_constexpr_is_refused() -> None:
    with pytest.raises(ValueError, match="overwrites assigns to"):
        specialize(overwrites, {"FLAG": True})


def test_elif_becomes_if_when_the_first_branch_dies() -> None:
    body = """
    if A:
        x = 1
    elif b:
        x = 2
    else:
        x = 3
    """
    assert pruned(body, A=False) == "if b:\n    x = 2\nelse:\n    x = 3"
    assert pruned(body, A=True) == "x = 1"


def test_known_elif_after_an_unknown_if() -> None:
    body = """
    if a:
        x = 1
    elif B:  # second
        x = 2
    elif b:
        x = 3
    else:
        x = 4
    """
    assert pruned(body, B=True) == "if a:\n    x = 1\nelse:\n    x = 2"
    assert pruned(body, B=False) == "if a:\n    x = 1\nelif b:\n    x = 3\nelse:\n    x = 4"


def test_nested_branches_and_loops_keep_their_comments() -> None:
    body = """
    for i in range(
        a
    ):
        # in the loop
        if A:
            if B:
                x = 1
            else:
                # kept
                x = 2  # here
                # trailing
        y = 1
    """
    want = """
    for i in range(
        a
    ):
        # in the loop
        # kept
        x = 2  # here
        # trailing
        y = 1
    """
    assert pruned(body, A=True, B=False) == expected(want)


def test_a_block_that_loses_everything_gets_pass() -> None:
    assert pruned("if a:\n    if A:\n        x = 1\nelse:\n    x = 2", A=False) == (
        "if a:\n    pass\nelse:\n    x = 2"
    )
    assert pruned("for i in a:\n    if A:\n        x = 1\ny = 2", A=False) == (
        "for i in a:\n    pass\ny = 2"
    )


def test_an_else_that_loses_everything_goes() -> None:
    assert pruned("if a:\n    x = 1\nelse:\n    if A:\n        x = 2", A=0) == "if a:\n    x = 1"


def test_strings_of_several_lines_keep_their_margin() -> None:
    body = 'if A:\n    x = """one\n      two"""\n    y = 1'
    assert pruned(body, A=True) == 'x = """one\n      two"""\ny = 1'


def test_body_on_the_line_of_the_if_is_refused() -> None:
    with pytest.raises(ValueError, match="put the body on its own line"):
        pruned("if A: x = 1", A=True)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("A", 4),
        ("not A", False),
        ("A and unknown", UNKNOWN),
        ("A or unknown", True),
        ("unknown or A", True),
        ("unknown and not A", False),
        ("0 < A <= 4", True),
        ("A % 3 == 1 and B is None", True),
        ("B is not None", False),
        ("A + unknown == 1", UNKNOWN),
        ("A in (4, 8)", True),
        ("A in (unknown, 8)", UNKNOWN),
        ("T == tl.float16", True),
        ("T != tl.float16", False),
        ("-A // 2 == -2", True),
        ("f(A)", UNKNOWN),
    ],
)
def test_evaluate(text: str, value: Any) -> None:
    tree = ast.parse(text, mode="eval").body
    result = evaluate(tree, {"A": 4, "B": None, "T": tl.float16})
    assert result is UNKNOWN if value is UNKNOWN else result == value


@pytest.mark.parametrize(
    "value", [1, True, -2.5, None, "a", 'x "quoted" \\n', 'two\nlines \\ """ end', tl.bfloat16]
)
def test_literals_evaluate_to_their_value(value: Any) -> None:
    assert eval(literal(value), {"tl": tl}) == value


def test_infinity_has_a_literal_and_a_list_has_none() -> None:
    assert eval(literal(float("-inf"))) == float("-inf")
    with pytest.raises(ValueError, match="cannot be written as a constexpr"):
        literal([1])


def test_constants_are_unwrapped() -> None:
    assert eval(literal(TEXT)) == "one\ntwo"


def test_parameters_on_one_line() -> None:
    head = "@triton.jit\ndef f(a, B: tl.constexpr, c, D: tl.constexpr):"
    assert drop_parameters(head, {"B", "D"}) == "@triton.jit\ndef f(a, c):"


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("x = a if F else b", "x = a"),
        ("x = a if not F else b", "x = b"),
        ("x = a if unknown else b", "x = a if unknown else b"),
        ("x = f(a if F else b, (c if T else d)[0])", "x = f(a, (d)[0])"),
        ("x = a if T else b if F else c", "x = b"),
        ("x = (\n    a  # first\n    if F\n    else b\n)\ny = 1", "x = (\n    a\n)\ny = 1"),
        ("y = a if F else b\nx = a if F else b", "y = a\nx = a"),
    ],
)
def test_operands_of_conditional_expressions(text: str, want: str) -> None:
    assert choose_operands(text, {"F": True, "T": False}) == want
