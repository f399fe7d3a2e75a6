"""Command-line flags made from a settings dataclass, so that the two cannot drift apart.

Each field becomes a flag of its name, type and default; its help is the field's entry in the class
docstring's ``Args:``. A first field without a default becomes the positional argument.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from headway.errors import InvalidInputError

Command = TypeVar("Command", bound=Callable[..., Any])


def takes(
    settings: type, name: str, only: Sequence[str] | None = None
) -> Callable[[Command], Command]:
    """Replace a command's parameter ``name`` by the flags of the dataclass ``settings``.

    ``only``: by these of its fields; what the command gets is then a dict of them.
    """

    def decorate(command: Command) -> Command:
        own = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in inspect.signature(command, eval_str=True).parameters.values()
            if parameter.name != name
        ]
        flags = [flag for flag in parameters(settings) if only is None or flag.name in only]
        names = [flag.name for flag in flags]

        @functools.wraps(command)
        def run(**given: Any) -> Any:
            fields = {flag: given.pop(flag) for flag in names}
            value = settings(**fields) if only is None else fields
            return command(**{name: value}, **given)

        # Arguments come in the order of the command line: the settings' own, then the command's.
        arguments = [flag for flag in flags if flag.default is inspect.Parameter.empty]
        others = [flag for flag in flags if flag.default is not inspect.Parameter.empty]
        run.__signature__ = inspect.Signature([*arguments, *own, *others])  # type: ignore[attr-defined]
        return run  # type: ignore[return-value]

    return decorate


def parameters(settings: type) -> Iterator[inspect.Parameter]:
    """The fields of a dataclass as a typer command's parameters."""
    hints = get_type_hints(settings)
    helps = field_docs(settings)
    for field in dataclasses.fields(settings):
        required = field.default is dataclasses.MISSING
        info = typer.Argument if required else typer.Option
        yield inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if required else field.default,
            annotation=Annotated[hints[field.name], info(help=helps[field.name])],
        )


def field_docs(settings: type) -> dict[str, str]:
    """Field name -> sentence, from the ``Args:`` of a class docstring."""
    _, _, block = inspect.cleandoc(settings.__doc__ or "").partition("Args:\n")
    found: dict[str, str] = {}
    names: list[str] = []
    for line in block.splitlines():
        entry = re.match(r"    (\w+(?:, \w+)*): (.*)", line)
        if entry:
            names = entry[1].split(", ")
            found.update(dict.fromkeys(names, entry[2]))
        elif line.startswith("        "):
            found.update({name: f"{found[name]} {line.strip()}" for name in names})
        else:
            break
    return {name: text.replace("None:", "default:") for name, text in found.items()}


def as_flag(error: InvalidInputError, words: Sequence[str]) -> str:
    """The error's message; its argument spelt as a flag where the command line ``words`` have it."""
    flag = "--" + error.argument.replace("_", "-")
    message = str(error)
    if any(word.partition("=")[0] == flag for word in words):
        return message.replace(error.argument, flag, 1)
    return message
