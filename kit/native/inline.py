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

from kit.sim.steps import CLOSE, OPEN

__all__ = ["inline_steps", "plain_masks"]

DECORATORS = {"step", "waiting_step"}
IN_PLACE = {ast.BitAnd: "&", ast.BitOr: "|", ast.BitXor: "^"}


def inline_steps(source: str, numbers: dict[str, int]) -> str:
    """Return the source of a module with its recorded functions (`kit.sim.steps`) written out.

    Parameters
    ----------
    numbers : dict
        A number for each step's name (`kit.sim.engine.Thread.key`); new names are added.

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
    """Return the source of a module about page masks with ``mask &= other`` written as ``mask = mask & (other)``.

    The compiler calls a class's own ``&`` at once, but asks Python what ``&=`` means. Targets that call something, and
    statements over several lines, are left.
    """
    if "from kit.memory.table.pagemask import" not in source:
        return source
    lines = source.encode().split(b"\n")  # columns are counted in bytes
    assignments = [each for each in ast.walk(ast.parse(source)) if isinstance(each, ast.AugAssign)]
    for found in sorted(assignments, key=lambda each: -each.col_offset):  # the last of a line first
        calls = any(isinstance(each, ast.Call) for each in ast.walk(found.target))
        if type(found.op) in IN_PLACE and found.lineno == found.end_lineno and not calls:
            line, (target, value) = lines[found.lineno - 1], map(ast.unparse, (found.target, found.value))
            written = f"{target} = {target} {IN_PLACE[type(found.op)]} ({value})"
            lines[found.lineno - 1] = line[: found.col_offset] + written.encode() + line[found.end_col_offset :]
    return b"\n".join(lines).decode()


def _write_out(function: ast.FunctionDef, lines: list[str], number: int) -> None:
    thread, text = function.args.args[1].arg, ast.get_docstring(function)
    top, end = function.decorator_list[0].lineno - 1, function.end_lineno or 0
    first, last = function.body[0].lineno - 1, function.body[0].end_lineno or 0
    if text is None or len(function.decorator_list) > 1 or _long_strings(function) or lines[end].strip():
        raise ValueError(f"line {function.lineno}: {function.name} cannot be written out with its span")
    margin = " " * function.body[0].col_offset
    said = f"{margin}{text!r}; {OPEN.format(thread=thread, key=f'{thread}.key({number}, {function.name!r})')}"
    signature = lines[function.lineno - 1 : first]
    # The decorator's line is the room that the signature moves up into; the docstring's lines are that of ``try``.
    head = [*signature, said, f"{margin}try:" + (" pass" if last == end else "")]
    lines[top:last] = head + [""] * (last - top - len(head))
    lines[last:end] = ["    " + line if line.strip() else line for line in lines[last:end]]
    lines[end] = f"{margin}finally: {CLOSE.format(thread=thread)}"


def _name(decorator: ast.expr) -> str:
    return decorator.id if isinstance(decorator, ast.Name) else ""


def _long_strings(function: ast.FunctionDef) -> bool:
    """Whether a string of the body goes over several lines: it cannot be indented."""
    strings = (each for statement in function.body[1:] for each in ast.walk(statement))
    return any(isinstance(s, ast.Constant | ast.JoinedStr) and s.end_lineno != s.lineno for s in strings)
