"""The ``kit`` command: its arguments, and what a wrong one says."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from kit import __version__
from kit.errors import KitError, ParameterError, did_you_mean

__all__ = ["BAD_INPUT", "FAILED", "OK", "main"]

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
# Files that `kit run` can write, by option: what they are.
EXPORTS = {
    "--json": "the result object",
    "--events": "the profiler's records as CSV",
    "--perfetto": "the timeline as Chrome JSON, for ui.perfetto.dev",
    "--nsys": "an SQLite file as Nsight Systems exports it (CUDA)",
}

FLOW_EXPORTS = ("--nsys",)  # only of flows whose report lists them


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"kit: error: {' '.join(message.split())} ({self.prog} --help lists what there is)\n")


def _add_scenario(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("flow", metavar="FLOW", help="name of a flow (kit list)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("-s", "--scenario", default="", metavar="SCENARIO", help="one of the flow's scenarios")
    source.add_argument("-f", "--file", default="", metavar="FILE", help="a YAML file of parameters")


def _add_pairs(parser: argparse.ArgumentParser, metavar: str = "name=value") -> None:
    parser.add_argument("-p", "--parameter", action="append", default=[], metavar=metavar, help="set a parameter")


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = _Parser(prog="kit", description="Run documented memory-fault paths, step by step and at scale.")
    parser.add_argument("--version", action="version", version=f"kit {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    made: dict[str, argparse.ArgumentParser] = {}

    def command(name: str, help: str) -> argparse.ArgumentParser:
        made[name] = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        return made[name]

    each = command("list", "list flows, their scenarios and the machines")
    each.add_argument("--json", action="store_true", help="as JSON")
    each = command("run", "run a flow and print the profiler's summary")
    _add_scenario(each)
    _add_pairs(each)
    for option, what in EXPORTS.items():
        each.add_argument(option, metavar="OUT", help=f"write {what}")
    each.add_argument("--summary", "--nvprof", action="store_true", help="print the profiler's summary alone")
    each.add_argument("--quiet", action="store_true", help="print nothing but errors")
    each = command("check", "run a flow and check documented steps and page content")
    _add_scenario(each)
    _add_pairs(each)
    each.add_argument("--all", action="store_true", help="every scenario of the flow")
    each = command("sweep", "run every combination of the given values and write one table")
    _add_scenario(each)
    _add_pairs(each, "name=v1,v2,...")
    each.add_argument("--out", required=True, metavar="DIR", help="folder for sweep.csv")
    each.add_argument("--jobs", default=str(os.cpu_count() or 1), metavar="N", help="runs at a time")
    each = command("batch", "execute notebooks through papermill and write reports")
    each.add_argument("flow", nargs="?", default="", metavar="FLOW", help="only this flow")
    each.add_argument("-s", "--scenario", default="", metavar="SCENARIO", help="only this scenario of FLOW")
    each.add_argument("--all", action="store_true", help="every scenario, not only the default one")
    each.add_argument("--out", default="out", metavar="DIR", help="folder for reports (out)")
    each = command("parameters", "print a flow's parameters as a Markdown table")
    each.add_argument("flow", metavar="FLOW")
    each.add_argument("--json", action="store_true", help="as JSON")
    each = command("compile", "compile the engine and the CUDA driver: the same results in a third of the time")
    each.add_argument("--if-possible", action="store_true", help="where it cannot be done, say why and go on")
    each.add_argument("--remove", action="store_true", help="delete what was compiled: the sources are run again")
    command("lab", "open JupyterLab on the notebooks; further arguments go to it")
    return parser, made


def _add_model(made: dict[str, argparse.ArgumentParser], arguments: Sequence[str]) -> None:
    """Give the command its flow's parameters as options, before the arguments are taken apart."""
    if not arguments or arguments[0] not in ("run", "check"):
        return
    from kit.flows.registry import ENTRIES
    from kit.options import add_options

    flow = next((word for word in arguments[1:] if word in ENTRIES), "")
    if flow:
        add_options(made[arguments[0]], ENTRIES[flow].load().Parameters)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser, made = _parser()
    if arguments and not arguments[0].startswith("-") and arguments[0] not in made:
        hint = did_you_mean(arguments[0], made)
        raise ParameterError("command", arguments[0], "one of " + ", ".join(made), hint)
    _add_model(made, arguments)
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command != "lab":
        if "flow" in options and options.command in ("run", "check"):
            from kit.flows.registry import entry

            entry(options.flow)  # a misspelt flow has no options: say that first
        known = made[options.command]._option_string_actions
        name, equals, value = rest[0].partition("=")
        given = value if equals else " ".join(rest[1:2])
        raise ParameterError(name, given, f"an option of kit {options.command}", did_you_mean(name, known))
    options.rest = rest
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the ``kit`` command.

    Parameters
    ----------
    arguments : sequence of str, optional
        What follows ``kit``; the process's own when left out.

    Returns
    -------
    int
        Exit status: 0 done, 1 failed, 2 bad input.
    """
    from kit import commands

    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options = _parse(given)
        status = commands.COMMANDS[options.command](options)
        sys.stdout.flush()
        return status
    except ParameterError as wrong:
        return _complain(wrong, BAD_INPUT)
    except BrokenPipeError:
        # The reader has gone: that is its choice, and Python's own flush at exit must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (KitError, OSError) as wrong:
        return _complain(wrong, FAILED)
    except KeyboardInterrupt:
        sys.stderr.write("\nkit: interrupted\n")
        return INTERRUPTED


def _complain(wrong: Exception, status: int) -> int:
    sys.stderr.write(f"kit: error: {' '.join(str(wrong).split())}\n")
    return status
