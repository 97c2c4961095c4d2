"""Spans written into functions record what the decorators record, and leave every line where it was."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from kit.native.build import MODULES
from kit.native.compiled import PACKAGE
from kit.native.inline import inline_steps, plain_masks
from kit.sim.engine import Engine
from kit.sim.trace import Trace

FILES = [file for pattern in MODULES for file in sorted(PACKAGE.glob(pattern))]
SAMPLE = '''
from kit.sim.trace import step, waiting_step


class Driver:
    @waiting_step
    def outer(self, thread, pages):
        """Wait, call, and pass the answer on.

        Twice.
        """
        thread.charge(2.0)
        yield from thread.sync()
        # A comment stays.
        for page in range(pages):
            try:
                answer = inner(self, thread, page)
            except ValueError:
                thread.note(status="NV_ERR")
        return answer

    @step
    def nothing(self, thread):
        """Do nothing."""


@step
def inner(driver, worker, page):
    """Refuse page 1."""
    worker.charge(1.5)
    driver.nothing(worker)
    if page == 1:
        raise ValueError(page)
    worker.note(va=page << 12, pages=1)
    return page
'''


def recorded(source: str) -> tuple[Trace, Any]:
    space: dict[str, Any] = {"__name__": "sample"}
    exec(compile(source, "sample.py", "exec"), space)
    engine = Engine()
    answer = engine.run(engine.start(space["Driver"]().outer(engine.thread("t"), 3)))
    return engine.trace, answer


def test_the_same_spans() -> None:
    (decorated, wanted), (inlined, found) = recorded(SAMPLE), recorded(inline_steps(SAMPLE, {}))
    assert found == wanted == 2
    assert inlined.steps.words == decorated.steps.words == ["outer", "inner", "nothing"]
    assert len(inlined.spans) == 7
    assert inlined.spans.array().tolist() == decorated.spans.array().tolist()


def test_no_decorator_is_left() -> None:
    assert "step\ndef" not in inline_steps(SAMPLE, {}).replace(" ", "")


def recorded_functions(tree: ast.Module) -> dict[int, ast.FunctionDef]:
    every = [each for each in ast.walk(tree) if isinstance(each, ast.FunctionDef)]
    return {each.end_lineno or 0: each for each in every if any("step" in ast.dump(d) for d in each.decorator_list)}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_statement_stays_in_its_line(file: Path) -> None:
    source = file.read_text("utf-8")
    tree, inlined = ast.parse(source), ast.parse(inline_steps(source, {}))
    bodies = {n.body[2].end_lineno: n for n in ast.walk(inlined) if isinstance(n, ast.FunctionDef) and len(n.body) == 3}
    for end, function in recorded_functions(tree).items():
        written = bodies[end + 1]  # ``finally`` takes the blank line that follows
        block = written.body[2]
        assert isinstance(block, ast.Try)
        assert ast.get_docstring(written) == ast.get_docstring(function)
        kept = function.body[1:]
        assert [(ast.dump(s), s.lineno, s.end_lineno) for s in kept] == [
            (ast.dump(s), s.lineno, s.end_lineno) for s in block.body if kept
        ]


@pytest.mark.parametrize(
    "source",
    [
        "@step\ndef f(a, thread):\n    return 1\n",
        "@other\n@step\ndef f(a, thread):\n    'Doc.'\n    return 1\n",
        "@step\ndef f(a, thread):\n    'Doc.'\n    return '''a\n    b'''\n",
        "@step\ndef f(a, thread):\n    'Doc.'\n    return 1\nx = 1\n",
    ],
    ids=["no docstring", "two decorators", "a string over lines", "no blank line after it"],
)
def test_what_cannot_be_written_out_is_refused(source: str) -> None:
    with pytest.raises(ValueError, match="f cannot be written out with its span"):
        inline_steps(source, {})


MASKS = """
from kit.memory.table.pagemask import PageMask


def f(block, mask, kept):
    for at in range(2):
        block[at] &= kept | at  # a comment
    mask |= block[0] if kept else block[1]; mask ^= 1
    block[min(0, 1)] &= 5
    mask = mask & ~kept & ~(block[1] & ~kept) if kept & ~block[0] else mask  # two in one
    block[0] &= ~mask
    block[1] = block[1] & ~(
        mask
    ) & ~(1 << 2)
    return mask
"""


class Mask(int):
    """A page mask, which can do what the compiled one can."""

    def andnot(self, other: int) -> Mask:
        return Mask(int(self) & ~int(other))

    def __and__(self, other: int) -> Mask:
        return Mask(int(self) & int(other))

    def __or__(self, other: int) -> Mask:
        return Mask(int(self) | int(other))

    def __xor__(self, other: int) -> Mask:
        return Mask(int(self) ^ int(other))


class _Plain(ast.NodeTransformer):
    """What `plain_masks` does to a text, done to its tree."""

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        right = node.right
        self.generic_visit(node)
        if not isinstance(node.op, ast.BitAnd) or not isinstance(right, ast.UnaryOp) or node.lineno != node.end_lineno:
            return node
        if not isinstance(right.op, ast.Invert) or ast.unparse(right).startswith("~(1 <<"):
            return node
        return ast.parse(f"({ast.unparse(node.left)}).andnot({ast.unparse(right.operand)})", mode="eval").body

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        asks = any(isinstance(each, ast.Call) for each in ast.walk(node.target))
        if asks or node.lineno != node.end_lineno or not isinstance(node.op, ast.BitAnd | ast.BitOr | ast.BitXor):
            return node
        target, value = ast.unparse(node.target), ast.unparse(node.value)
        sign = {ast.BitAnd: "&", ast.BitOr: "|", ast.BitXor: "^"}[type(node.op)]
        return self.visit(ast.parse(f"{target} = {target} {sign} ({value})").body[0])


@pytest.mark.parametrize("source", [MASKS, *(file.read_text("utf-8") for file in FILES)])
def test_masks_are_combined_plainly_and_nothing_else_changes(source: str) -> None:
    wanted = ast.parse(source)
    if "pagemask import" in source:
        wanted = _Plain().visit(wanted)
    assert ast.dump(ast.parse(plain_masks(source))) == ast.dump(wanted)
    assert plain_masks(source).count("\n") == source.count("\n")


def test_plain_masks_mean_the_same() -> None:
    assert "block[at] = block[at] & (kept | at)  # a comment" in plain_masks(MASKS)
    assert "block[min(0, 1)] &= 5" in plain_masks(MASKS)
    assert (
        "mask = mask.andnot(kept).andnot(block[1].andnot(kept)) if kept.andnot(block[0]) else mask  # two in one"
        in plain_masks(MASKS)
    )
    assert "block[0] = block[0].andnot(mask)" in plain_masks(MASKS) and "~(1 << 2)" in plain_masks(MASKS)
    found = []
    for source in (MASKS, plain_masks(MASKS)):
        space: dict[str, Any] = {}
        exec(source, space)
        block = [Mask(7), Mask(12)]
        found.append([(space["f"](block, Mask(2), Mask(kept)), list(block)) for kept in (0, 6, 8, 15)])
    assert found[0] == found[1]
