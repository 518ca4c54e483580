"""Cut decided branches out of the text of one function."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Mapping
from typing import Any

from qoqc.codegen.decide import UNKNOWN, evaluate

_NO_CODE = (tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT)


class Pruner:
    """One function's text with the branches that `values` decide cut out. Lines count from 1."""

    def __init__(self, source: str, values: Mapping[str, Any]) -> None:
        """Parse `source`, one function definition at column 0."""
        self.lines = source.split("\n")
        self.values = values
        fn = ast.parse(source).body[0]
        assert isinstance(fn, ast.FunctionDef)
        self.fn = fn
        self.line_ends: list[int] = []
        self.elses: list[tuple[int, int]] = []
        self._scan(source)
        self.in_string = {
            row
            for node in ast.walk(fn)
            if isinstance(node, (ast.Constant, ast.JoinedStr))
            for row in range(node.lineno + 1, (node.end_lineno or 0) + 1)
        }

    def _scan(self, source: str) -> None:
        """Note where logical lines end and where `else` stands: the syntax tree does not say."""
        first = True
        for token in tokenize.generate_tokens(io.StringIO(source + "\n").readline):
            if token.type == tokenize.NEWLINE:
                self.line_ends.append(token.start[0])
                first = True
            elif token.type == tokenize.NAME and first:
                if token.string == "else":
                    self.elses.append(token.start)
                first = False
            elif token.type not in (
                tokenize.NL,
                tokenize.COMMENT,
                tokenize.INDENT,
                tokenize.DEDENT,
            ):
                first = False

    def function(self) -> tuple[str, str]:
        """The header (decorators and signature) and the pruned body."""
        low = self._after_header(self.fn.lineno)
        body = self._block(self.fn.body, low, len(self.lines) + 1, 0)
        kept = [s for i, s in enumerate(body) if s.strip() or (i and body[i - 1].strip())]
        return "\n".join(self.lines[: low - 1]), "\n".join(kept).rstrip()

    def _after_header(self, row: int) -> int:
        return next(end for end in self.line_ends if end >= row) + 1

    def _text(self, low: int, high: int, shift: int) -> list[str]:
        """Lines low..high-1, moved left by `shift` columns."""
        out = []
        for row in range(low, high):
            line = self.lines[row - 1]
            cut = min(shift, len(line) - len(line.lstrip()))
            out.append(line if row in self.in_string else line[cut:])
        return out

    def _end(self, node: ast.stmt) -> int:
        """The line after a statement, comments that stand deeper than it included."""
        end = (node.end_lineno or node.lineno) + 1
        while end <= len(self.lines):
            line = self.lines[end - 1]
            if not line.lstrip().startswith("#"):
                break
            if len(line) - len(line.lstrip()) <= node.col_offset:
                break
            end += 1
        return end

    def _block(self, body: list[ast.stmt], low: int, high: int, shift: int) -> list[str]:
        """Lines low..high-1, which hold the statements `body`, pruned."""
        out: list[str] = []
        for node in body:
            if not isinstance(node, (ast.If, ast.For, ast.While)):
                continue
            start, end = self._after_header(node.lineno), self._end(node)
            out += self._text(low, node.lineno, shift)
            if node.body[0].lineno < start:
                raise ValueError(
                    f"line {node.lineno} of {self.fn.name}: put the body on its own line"
                )
            if isinstance(node, ast.If):
                out += self._if(node, end, shift)
            elif node.orelse:
                raise ValueError(f"line {node.lineno} of {self.fn.name}: a loop with `else`")
            else:
                out += self._text(node.lineno, start, shift)
                out += self._nonempty(self._block(node.body, start, end, shift), node, shift)
            low = end
        return out + self._text(low, high, shift)

    def _decide(self, node: ast.If) -> bool | None:
        value = evaluate(node.test, self.values)
        return None if value is UNKNOWN else bool(value)

    def _if(self, node: ast.If, high: int, shift: int) -> list[str]:
        """An `if` (or an `elif` that has become the first branch)."""
        known = self._decide(node)
        if known is None:
            return self._alive(node, "if", high, shift)
        if known:
            return self._body(node, high, shift + self._indent(node))
        if (following := self._elif(node)) is not None:
            return self._if(following, high, shift)
        if not node.orelse:
            return []
        low = self._after_header(self._else_row(node))
        return self._block(node.orelse, low, high, shift + self._indent(node))

    def _alive(self, node: ast.If, keyword: str, high: int, shift: int) -> list[str]:
        """A branch whose test stays in the text, and what follows it."""
        header = self._text(node.lineno, self._after_header(node.lineno), shift)
        margin = " " * (node.col_offset - shift)
        test = header[0][len(margin) :]
        header[0] = margin + keyword + test.removeprefix("el").removeprefix("if")
        body = self._nonempty(self._body(node, high, shift), node, shift)
        return header + body + self._rest(node, high, shift)

    def _rest(self, node: ast.If, high: int, shift: int) -> list[str]:
        """The `elif` and `else` branches after a branch that stays."""
        if not node.orelse:
            return []
        following = self._elif(node)
        if following is None:
            row = self._else_row(node)
            low = self._after_header(row)
            body = self._block(node.orelse, low, high, shift)
            return self._text(row, low, shift) + body if _has_code(body) else []
        known = self._decide(following)
        if known is None:
            return self._alive(following, "elif", high, shift)
        if not known:
            return self._rest(following, high, shift)
        body = self._body(following, high, shift)
        return [" " * (node.col_offset - shift) + "else:", *body] if _has_code(body) else []

    def _body(self, node: ast.If, high: int, shift: int) -> list[str]:
        stop = high
        if (following := self._elif(node)) is not None:
            stop = following.lineno
        elif node.orelse:
            stop = self._else_row(node)
        return self._block(node.body, self._after_header(node.lineno), stop, shift)

    def _elif(self, node: ast.If) -> ast.If | None:
        if len(node.orelse) == 1 and isinstance(node.orelse[0], ast.If):
            row = self.lines[node.orelse[0].lineno - 1]
            if row[node.orelse[0].col_offset :].startswith("elif"):
                return node.orelse[0]
        return None

    def _else_row(self, node: ast.If) -> int:
        first = node.orelse[0].lineno
        return max(row for row, col in self.elses if row < first and col == node.col_offset)

    def _indent(self, node: ast.If) -> int:
        return node.body[0].col_offset - node.col_offset

    def _nonempty(self, body: list[str], owner: ast.stmt, shift: int) -> list[str]:
        """`body`, or `pass` where pruning left nothing of it."""
        return body if _has_code(body) else [*body, " " * (owner.col_offset + 4 - shift) + "pass"]


def _has_code(lines: list[str]) -> bool:
    return any(line.strip() and not line.lstrip().startswith("#") for line in lines)
