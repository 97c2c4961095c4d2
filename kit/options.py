"""Command-line options made from a flow's parameter model, and text turned into its types."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, get_args, get_origin

from kit.errors import ParameterError, did_you_mean

if TYPE_CHECKING:
    from kit.flows.parameters import Parameters

__all__ = ["add_options", "axes", "given", "parameters_markdown", "value_of"]

_PREFIX = "parameter:"
_BOOLS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def _allowed(model: type[Parameters], name: str) -> str:
    return next(str(row["allowed"]) for row in model.rows() if row["name"] == name)


def _scalar(kind: Any, text: str) -> Any:
    if kind is bool:
        return _BOOLS[text.lower()]
    if kind is int:
        return int(text, 0)
    return float(text) if kind is float else text


def _list(kind: Any, text: str) -> list[Any]:
    if text.lstrip().startswith("[["):
        return list(json.loads(text))
    inner = text.strip().removeprefix("[").removesuffix("]").strip()
    return [_scalar(kind, part.strip()) for part in inner.split(",")] if inner else []


def value_of(model: type[Parameters], name: str, text: str) -> Any:
    """Return `text` as the type that the model gives parameter `name`.

    An unknown name keeps its text: the model's own check says what is wrong with it.

    Raises
    ------
    ParameterError
        The text does not spell a value of that type.
    """
    info = model.model_fields.get(name)
    if info is None:
        return text
    kind = info.annotation
    try:
        if get_origin(kind) is list:
            return _list((get_args(kind) or (str,))[0], text)
        return _scalar(kind, text)
    except (ValueError, KeyError):
        raise ParameterError(name, text, _allowed(model, name)) from None


def _split(pair: str) -> tuple[str, str]:
    name, equals, text = pair.partition("=")
    if not equals or not name.strip():
        raise ParameterError("-p", pair, "name=value")
    return name.strip(), text


def _once(given: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the texts by parameter.

    Raises
    ------
    ParameterError
        A parameter is given twice: neither is more right than the other.
    """
    found: dict[str, str] = {}
    for name, text in given:
        if name in found:
            raise ParameterError(name, text, f"one value; the command line gives it {found[name]!r} too")
        found[name] = text
    return found


def axes(model: type[Parameters], pairs: Iterable[str]) -> dict[str, list[Any]]:
    """Return the values that ``-p name=v1,v2,...`` arguments go through; lists are parted by ``;``."""
    found: dict[str, list[Any]] = {}
    for name, text in _once(map(_split, pairs)).items():
        info = model.model_fields.get(name)
        if info is None:
            hint = did_you_mean(name, model.model_fields)
            raise ParameterError(name, text, f"a parameter of {model.flow}", hint)
        parts = text.split(";" if get_origin(info.annotation) is list else ",")
        found[name] = [value_of(model, name, part.strip()) for part in parts]
    return found


def add_options(parser: argparse.ArgumentParser, model: type[Parameters]) -> None:
    """Give `parser` one option for each parameter, under the model's headings."""
    groups: dict[str, Any] = {}
    for row in model.rows():
        option = "--" + row["name"].replace("_", "-")
        if option in parser._option_string_actions:
            continue  # such a parameter is set with -p
        if row["group"] not in groups:
            groups[row["group"]] = parser.add_argument_group(f"{row['group']} parameters")
        text = f"{row['help']}; {row['allowed']}; default {_plain(row['default'])}".replace("%", "%%")
        groups[row["group"]].add_argument(
            option, dest=_PREFIX + row["name"], metavar="VALUE", help=text, default=argparse.SUPPRESS, action="append"
        )


def given(model: type[Parameters], options: argparse.Namespace) -> dict[str, Any]:
    """Return what ``-p`` and the options of `add_options` set, in the model's types."""
    pairs = [_split(pair) for pair in options.parameter]
    for key, texts in vars(options).items():
        if key.startswith(_PREFIX):
            pairs += [(key.removeprefix(_PREFIX), text) for text in texts]
    return {name: value_of(model, name, text) for name, text in _once(pairs).items()}


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "empty" if value in ("", []) else str(value)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def parameters_markdown(model: type[Parameters]) -> str:
    """Return the model as a Markdown table a heading."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in model.rows():
        groups.setdefault(row["group"], []).append(row)
    lines: list[str] = []
    for group, rows in groups.items():
        lines += [f"### {group}", "", _row(("parameter", "default", "allowed", "meaning", "read by", "documented as"))]
        lines.append("|---|---|---|---|---|---|")
        for row in rows:
            documented = f"`{row['documented']}`" if row["documented"] else ""
            read_by = ", ".join(row["programs"]) or "all"
            name = f"`{row['name']}`"
            lines.append(_row((name, _plain(row["default"]), row["allowed"], row["help"], read_by, documented)))
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"
