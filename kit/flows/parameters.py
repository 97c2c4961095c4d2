"""The one definition of a flow's parameters, and the strict check that papermill does not make."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from kit.errors import ParameterError, did_you_mean
from kit.sim.machine import check_machine

__all__ = ["GROUPS", "Parameters", "parameter"]

_KINDS: dict[Any, tuple[str, str]] = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true or false"),
}
GROUPS = ("Program", "Machine", "Memory", "Driver policy", "Run")


def parameter(
    default: Any,
    help: str,
    *,
    unit: str = "",
    group: str = "Program",
    choices: tuple[Any, ...] = (),
    programs: tuple[str, ...] = (),
    documented: str = "",
    **bounds: Any,
) -> Any:
    """Declare one parameter.

    Parameters
    ----------
    default : object
        A plain type, so that papermill can write it.
    help : str
        One line in plain words.
    unit : str
        Unit of the value, shown beside it everywhere.
    group : str
        Heading under which controls and tables list it.
    choices : tuple
        What a word or number may be, when it is one of a few.
    programs : tuple of str
        Programs that read it; empty when all do.
    documented : str
        Name of the real system's parameter when it is one.
    **bounds
        ``ge``, ``gt``, ``le``, ``lt`` as in pydantic.
    """
    extra: dict[str, Any] = {
        "unit": unit,
        "group": group,
        "choices": list(choices),
        "programs": list(programs),
        "documented": documented,
    }
    factory = isinstance(default, (list, dict))
    how: dict[str, Any] = {"default_factory": lambda: type(default)(default)} if factory else {"default": default}
    return Field(description=help, json_schema_extra=extra, **how, **bounds)


class Parameters(BaseModel):
    """Base of every flow's parameter model: strict types, no unknown names, one clear error."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, validate_default=True)
    flow: ClassVar[str] = ""
    system: ClassVar[str] = "uvm"  # the machines that it can run on: profiles of this driver
    chooser: ClassVar[str] = "program"  # the parameter whose values `programs` lists, where the flow has one

    @classmethod
    def check(cls, given: Mapping[str, Any]) -> Self:
        """Validate `given`, or raise one `ParameterError` about the first thing wrong with it."""
        try:
            made = cls.model_validate(_whole_floats(cls, given))
        except ValidationError as wrong:
            raise cls._explain(wrong.errors()[0]) from None
        for name, info in cls.model_fields.items():
            choices = extra(info)["choices"]
            value = getattr(made, name)
            if choices and value not in choices:
                hint = did_you_mean(value, map(str, choices)) if isinstance(value, str) else ""
                raise ParameterError(name, value, "one of " + ", ".join(map(str, choices)), hint)
        machine = getattr(made, "machine", None)
        if machine is not None:
            check_machine(machine, cls.system)
        made._check_read()
        made.contradictions()
        return made

    def _check_read(self) -> None:
        """Raise when a parameter differs from its default although the chosen program does not read it."""
        chosen = getattr(self, self.chooser, None)
        for name, info in type(self).model_fields.items():
            programs, value = extra(info)["programs"], getattr(self, name)
            default = info.get_default(call_default_factory=True)
            if programs and chosen not in programs and value != default:
                readers = " or ".join(programs)
                allowed = f"its default, {default!r}, with {self.chooser} = {chosen}: it is read with {readers}"
                raise ParameterError(name, value, allowed)

    def contradictions(self) -> None:
        """Raise `ParameterError` when parameters that are fine alone do not go together."""

    @classmethod
    def _explain(cls, error: ErrorDetails) -> ParameterError:
        name = ".".join(str(part) for part in error["loc"])
        value = error["input"]
        if error["type"] == "extra_forbidden":
            known = list(cls.model_fields)
            hint = did_you_mean(name, known)
            return ParameterError(name, value, f"a parameter of {cls.flow or cls.__name__}", hint)
        info = cls.model_fields.get(str(error["loc"][0]))
        return ParameterError(name, value, _allowed(info) if info else error["msg"])

    @classmethod
    def rows(cls) -> Iterator[dict[str, Any]]:
        """Yield one row a parameter: name, type, default, unit, group, choices, programs, help, bounds."""
        for name, info in sorted(cls.model_fields.items(), key=lambda item: _group_rank(extra(item[1])["group"])):
            default = info.get_default(call_default_factory=True)
            yield {
                "name": name,
                "type": getattr(info.annotation, "__name__", str(info.annotation)),
                "default": default,
                "help": info.description or "",
                "allowed": _allowed(info),
                "ge": _bound(info, "ge", "gt"),
                "le": _bound(info, "le", "lt"),
                **extra(info),
            }


def _group_rank(group: str) -> int:
    """Known headings come in their fixed order, a flow's own ones after them."""
    return GROUPS.index(group) if group in GROUPS else len(GROUPS)


def extra(info: FieldInfo) -> dict[str, Any]:
    """Return what `parameter` recorded beside pydantic's own facts."""
    found = info.json_schema_extra
    return dict(found) if isinstance(found, dict) else {}


def _whole_floats(cls: type[Parameters], given: Mapping[str, Any]) -> dict[str, Any]:
    """Let ``1`` stand for ``1.0``: YAML and papermill write whole floats as integers."""
    return {
        name: float(value)
        if name in cls.model_fields and cls.model_fields[name].annotation is float and type(value) is int
        else value
        for name, value in given.items()
    }


def _bound(info: FieldInfo, *names: str) -> float | None:
    for constraint in info.metadata:
        for name in names:
            found = getattr(constraint, name, None)
            if found is not None:
                return float(found)
    return None


def _kind(annotation: Any, many: bool = False) -> str:
    """Say in words what a type is, of one value or of `many`."""
    if get_origin(annotation) is list:
        return ("lists" if many else "a list") + " of " + _kind((*get_args(annotation), str)[0], many=True)
    one, more = _KINDS.get(annotation, ("text", "texts"))
    return more if many else one


def _allowed(info: FieldInfo) -> str:
    """Say in words what a parameter may be."""
    facts = extra(info)
    if facts.get("choices"):
        return "one of " + ", ".join(map(str, facts["choices"]))
    kind = _kind(info.annotation)
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    limits = [
        f"{word} {found:g}" if isinstance(found, float) else f"{word} {found}"
        for constraint in info.metadata
        for name, word in words.items()
        if (found := getattr(constraint, name, None)) is not None
    ]
    unit = f" {facts['unit']}" if facts.get("unit") else ""
    return kind + (" " + " and ".join(limits) if limits else "") + unit
