"""Triton's interpreter without the work it throws away, which is most of what small kernels cost in it.

Before each call of a device function it replaces the language's functions by its own, although they have
been replaced since the launch began; and it computes whether each sum of integers overflows, but looks at
that in its debug mode alone.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any


def quicken() -> None:
    """Leave both out. What kernels compute, and what they are told of errors, is the same."""
    from triton import language
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):
        return  # a Triton that replaces in another way
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter._patch_lang = _once(interpreter._patch_lang, (language, language.core))


def _once(replace: Callable[[Any], Any], languages: tuple[Any, ...]) -> Callable[[Any], Any]:
    """``replace(function)``, unless what the function calls is replaced already.

    A launch puts back what it replaced when it ends; calls within never do, as in Triton itself.
    """
    replaced: set[str] = set()

    def replace_once(function: Any) -> Any:
        values = [value for value in function.__globals__.values() if inspect.ismodule(value)]
        seen = {value.__name__ for value in values if value in languages}
        missing = seen - replaced
        if seen and not missing:
            return _Nothing()
        scope = replace(function)
        replaced.update(missing)
        put_back = scope.restore

        def restore() -> None:
            put_back()
            replaced.difference_update(missing)

        scope.restore = restore
        return scope

    return replace_once


class _Nothing:
    """What a launch within a launch would put back."""

    def restore(self) -> None:
        pass
