"""The decorators that record a driver function as a span named after it.

Tens of spans are opened for one fault, so what records them is written out for each list of parameters,
as `dataclasses` writes out ``__init__``: a wrapper that takes ``*args`` and hands them on costs four times as much.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from inspect import Parameter, signature
from typing import Any, TypeVar, cast

__all__ = ["step", "waiting_step"]

F = TypeVar("F", bound=Callable[..., Any])

# What `Thread.enter` and `Thread.leave` do, without calling them.
_RECORDED = """
def make(_span_function, _span_name):
    def recorded({parameters}):
        _span_log = {thread}.log
        {thread}.at = _span = _span_log.add({thread}.now, {thread}.now, {thread}.keys[_span_name], {thread}.at)
        try:
            return {call}
        finally:
            {thread}.at = _span_log.close(_span, {thread}.now)
    return recorded
"""
_MARKS: dict[Any, str] = {Parameter.VAR_POSITIONAL: "*", Parameter.VAR_KEYWORD: "**"}


def step(function: F) -> F:
    """Record a driver function as a span named after it.

    Its second argument is the `Thread` that runs it: the clock gives start and end, the stack the
    parent.
    """
    return _recorded(function, waits=False)


def waiting_step(function: F) -> F:
    """`step` for a function that may wait, to be driven with ``yield from``; it may pass on what another returns."""
    return _recorded(function, waits=True)


def _recorded(function: F, waits: bool) -> F:
    parameters, arguments, named = [], [], False
    found = list(signature(function).parameters.values())
    for each in found:
        if each.kind is Parameter.KEYWORD_ONLY and not named:
            named = True
            parameters.append("*")
        named |= each.kind is Parameter.VAR_POSITIONAL
        mark = _MARKS.get(each.kind, "")
        parameters.append(mark + each.name)
        arguments.append(f"{each.name}={each.name}" if each.kind is Parameter.KEYWORD_ONLY else mark + each.name)
    make = _maker(found[1].name, ", ".join(parameters), ", ".join(arguments), waits)
    recorded = make(function, function.__name__)
    # Code of its own: the interpreter speeds up a call where it always finds the same function.
    recorded.__code__ = recorded.__code__.replace(co_name=function.__name__)
    recorded.__defaults__ = function.__defaults__
    recorded.__kwdefaults__ = function.__kwdefaults__
    return cast(F, wraps(function)(recorded))


@cache
def _maker(thread: str, parameters: str, arguments: str, waits: bool) -> Callable[[Any, str], Any]:
    """Return what makes a recording function of these parameters."""
    call = f"(yield from _span_function({arguments}))" if waits else f"_span_function({arguments})"
    names: dict[str, Any] = {}
    exec(
        _RECORDED.format(thread=thread, parameters=parameters, call=call),
        {"__name__": __name__},
        names,
    )
    return cast("Callable[[Any, str], Any]", names["make"])
