"""Steps written into the functions that they record, for the compiler: it cannot see through a decorator.

    @step
    def f(gpu, thread):                 def f(gpu, thread):
        "What f does."          ->          "What f does."; (the span is opened)
        work()                              try:
                                                work()
                                            finally: (it is closed)

Every line of a body stays at its number, so that a traceback names the line that one reads.
"""

from __future__ import annotations

import ast

__all__ = ["inline_steps", "plain_masks"]

DECORATORS = {"step", "waiting_step"}
IN_PLACE = {ast.BitAnd: "&", ast.BitOr: "|", ast.BitXor: "^"}


def inline_steps(source: str, numbers: dict[str, int]) -> str:
    """Return the source of a module with its recorded functions (`kit.sim.steps`) written out.

    Parameters
    ----------
    numbers : dict
        A number for each step's name (`kit.sim.engine.Thread.enter`); new names are added.

    Raises
    ------
    ValueError
        A recorded function without a docstring, with another decorator, with a string over several lines, or with no
        blank line after it: there is no room, or no way, to write it out.
    """
    lines = source.split("\n")
    for found in ast.walk(ast.parse(source)):
        if isinstance(found, ast.FunctionDef) and DECORATORS & {_name(each) for each in found.decorator_list}:
            _write_out(found, lines, numbers.setdefault(found.name, len(numbers)))
    return "\n".join(lines)


def plain_masks(source: str) -> str:
    """Return the source of a module about page masks as the compiler likes it best.

    ``mask &= other`` becomes ``mask = mask & (other)``: the compiler calls a class's own ``&`` at once, but asks Python
    what ``&=`` means. ``mask & ~other`` becomes ``mask.andnot(other)``, which makes one mask instead of two. Targets
    that call something, and what goes over several lines, are left.
    """
    if "from kit.memory.table.pagemask import" not in source:
        return source
    assignments = [each for each in ast.walk(ast.parse(source)) if isinstance(each, ast.AugAssign)]
    source = _rewrite(source, [(each, _plain(each)) for each in assignments if _can_be_plain(each)])
    differences = [each for each in ast.walk(ast.parse(source)) if isinstance(each, ast.expr) and _is_difference(each)]
    inner = {id(below) for each in differences for below in ast.walk(each) if below is not each}
    outer = [each for each in differences if id(each) not in inner]
    return _rewrite(source, [(each, ast.unparse(_Differences().visit(each))) for each in outer])


class _Differences(ast.NodeTransformer):
    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        if not _is_difference(node):
            return node
        assert isinstance(node.right, ast.UnaryOp)
        return ast.Call(ast.Attribute(node.left, "andnot", ast.Load()), [node.right.operand], [])


def _is_difference(node: ast.AST) -> bool:
    """Whether it is ``a & ~b`` of masks; ``1 << b`` is a bit of an integer."""
    match node:
        case ast.BinOp(op=ast.BitAnd(), right=ast.UnaryOp(op=ast.Invert(), operand=operand)):
            return not isinstance(operand, ast.BinOp) or not isinstance(operand.left, ast.Constant)
    return False


def _can_be_plain(found: ast.AugAssign) -> bool:
    return type(found.op) in IN_PLACE and not any(isinstance(each, ast.Call) for each in ast.walk(found.target))


def _plain(found: ast.AugAssign) -> str:
    target, value = map(ast.unparse, (found.target, found.value))
    return f"{target} = {target} {IN_PLACE[type(found.op)]} ({value})"


def _rewrite(source: str, places: list[tuple[ast.AugAssign | ast.expr, str]]) -> str:
    """Put a text in the place of each statement or expression that is in one line."""
    lines = source.encode().split(b"\n")  # columns are counted in bytes
    for found, text in sorted(places, key=lambda place: -place[0].col_offset):  # the last of a line first
        if found.lineno == found.end_lineno:
            line = lines[found.lineno - 1]
            lines[found.lineno - 1] = line[: found.col_offset] + text.encode() + line[found.end_col_offset :]
    return b"\n".join(lines).decode()


def _write_out(function: ast.FunctionDef, lines: list[str], number: int) -> None:
    thread, text = function.args.args[1].arg, ast.get_docstring(function)
    top, end = function.decorator_list[0].lineno - 1, function.end_lineno or 0
    first, last = function.body[0].lineno - 1, function.body[0].end_lineno or 0
    if text is None or len(function.decorator_list) > 1 or _long_strings(function) or lines[end].strip():
        raise ValueError(f"line {function.lineno}: {function.name} cannot be written out with its span")
    margin = " " * function.body[0].col_offset
    said = f"{margin}{text!r}; _span = {thread}.enter({number}, {function.name!r})"
    signature = lines[function.lineno - 1 : first]
    # The decorator's line is the room that the signature moves up into; the docstring's lines are that of ``try``.
    head = [*signature, said, f"{margin}try:" + (" pass" if last == end else "")]
    lines[top:last] = head + [""] * (last - top - len(head))
    lines[last:end] = ["    " + line if line.strip() else line for line in lines[last:end]]
    lines[end] = f"{margin}finally: {thread}.leave(_span)"


def _name(decorator: ast.expr) -> str:
    return decorator.id if isinstance(decorator, ast.Name) else ""


def _long_strings(function: ast.FunctionDef) -> bool:
    """Whether a string of the body goes over several lines: it cannot be indented."""
    strings = (each for statement in function.body[1:] for each in ast.walk(statement))
    return any(isinstance(s, ast.Constant | ast.JoinedStr) and s.end_lineno != s.lineno for s in strings)
