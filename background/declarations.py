"""Checks of a worker class: the names of its attributes, the parameters of its methods, and its constructor."""

import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from difflib import get_close_matches
from types import CodeType, FunctionType
from typing import Any

from .errors import InvalidWorker
from .worker import snake_case

_ANYTHING = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
_POSITIONAL = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}
_NEAR = 0.8  # of 1, by difflib: max_attemps and tiemout are near, handle_one and first_name are not

_USUAL = {"ping_url"}  # api_url and page_url are names that a user may well choose


def refuse_misspelled(cls: type, base: type) -> None:
    """Raise InvalidWorker for an attribute of `cls` with nearly the name of an attribute of `base` that is not set.

    Any other attribute, and an attribute that the methods of the class use, is the user's own.
    """
    own = [each for each in cls.__mro__ if each not in base.__mro__]
    declared = {name for each in own for name in vars(each)}
    if vars(cls)["name"] == snake_case(cls.__name__):  # the engine's own default
        declared.discard("name")
    known = {"name"} | {name for name in vars(base) if not name.startswith("_")}
    for name in sorted(declared - known - _used(own)):
        meant = None if name.startswith("_") else _meant(name, known - declared)
        if meant is not None:
            raise InvalidWorker(
                f"{cls.__name__} has an attribute {name!r}, which the engine does not know. Did you mean {meant!r}? "
                "If the attribute is your own, give it a name that is less similar."
            )


def refuse_misplaced(cls: type, base: type, misplaced: Collection[str], expected: str) -> None:
    """Raise InvalidWorker for an attribute of the other kind of worker, unless the methods of the class use it."""
    own = [each for each in cls.__mro__ if each not in base.__mro__]
    declared = {name for each in own for name in vars(each)}
    for name in sorted(declared & set(misplaced) - _used(own)):
        other, this = ("PeriodicWorker", "MessageWorker")[:: -1 if base.__name__ == "PeriodicWorker" else 1]
        raise InvalidWorker(f"{cls.__name__}.{name} is for a {other} only; expected {expected} on a {this}: remove it.")


def _meant(name: str, known: set[str]) -> str | None:
    """Return the name of `known` that is nearly `name`, or None."""
    plain = {each.replace("_", ""): each for each in sorted(known)}
    spelt = name.replace("_", "").lower()
    for at in range(len(spelt) - 1):  # difflib rates swapped letters in a short name as far apart
        if (swapped := f"{spelt[:at]}{spelt[at + 1]}{spelt[at]}{spelt[at + 2 :]}") in plain:
            return plain[swapped]
    return next(iter(get_close_matches(name.lower(), known - _USUAL, n=1, cutoff=_NEAR)), plain.get(spelt))


def _used(classes: list[type]) -> set[str]:
    """Return the attributes that the methods of these classes mention."""
    values = (value for each in classes for value in vars(each).values())
    return {name for value in values for code in _codes(value) for name in code.co_names}


def _codes(value: Any) -> Iterator[CodeType]:
    for part in (value, *(getattr(value, name, None) for name in ("fget", "func", "__func__", "__wrapped__"))):
        found = [part.__code__] if isinstance(part, FunctionType) else []
        while found:
            code = found.pop()
            yield code
            found += [each for each in code.co_consts if isinstance(each, CodeType)]


def check_method(cls: type, name: str, *parameters: str) -> None:
    """Raise InvalidWorker unless the method can be called with `parameters`, and does its work in that call."""
    found, expected = inspect.getattr_static(cls, name), f"{name}({', '.join(('self', *parameters))})"
    is_method = hasattr(found, "__get__") and not isinstance(found, property)
    method = found.__get__(object(), cls) if is_method else found
    if not callable(method):
        raise InvalidWorker(f"{cls.__name__}.{name} is {found!r:.100}; expected a method: write def {expected}.")
    function, number = getattr(method, "__func__", method), len(parameters) + inspect.ismethod(method)
    if _is_generator(function):
        raise InvalidWorker(
            f"{cls.__name__}.{name} is a generator, so calling it does nothing; expected a method "
            "that does its work when it is called: move the generator into a helper, and loop over it."
        )
    if (signature := _misfit(function, number)) is not None:
        kind = "@staticmethod " if isinstance(found, staticmethod) else ""
        raise InvalidWorker(
            f"{cls.__name__}.{name} is declared as {kind}{name}{signature}; expected {expected}: "
            f"it is called with {' and '.join(f'the {each}' for each in parameters)} alone."
        )


def check_constructor(cls: type) -> None:
    """Raise InvalidWorker for a class that cannot be called without arguments."""
    if (signature := _misfit(cls, 0)) is not None:
        raise InvalidWorker(
            f"{cls.__name__}{signature} needs arguments; expected a class that is called without any: "
            "ask for a service where it is used, by context.services.get(...)."
        )


def _is_generator(function: Callable[..., Any]) -> bool:
    """Return whether the function has a `yield`, also below decorators and partial functions."""
    with suppress(ValueError):  # a wrapper may wrap itself
        layers = function, inspect.unwrap(function)
        return any(inspect.isgeneratorfunction(each) or inspect.isasyncgenfunction(each) for each in layers)
    return False


def _misfit(function: Callable[..., Any], number: int) -> inspect.Signature | None:
    """Return the parameters of the function, without types, if a call with `number` arguments does not suit them.

    A wrapper that passes on all its arguments has the parameters of the function that it wraps. It may add arguments,
    so that function may need more.
    """
    try:
        own, inner = (inspect.signature(function, follow_wrapped=each) for each in (False, True))
    except (TypeError, ValueError):  # they are unknown, as for some built-in functions
        return None
    kinds = [each.kind for each in inner.parameters.values()]
    if {each.kind for each in own.parameters.values()} <= _ANYTHING:
        fits = inspect.Parameter.VAR_POSITIONAL in kinds or sum(kind in _POSITIONAL for kind in kinds) >= number
        return None if fits else _bare(inner)
    return None if _takes(own, number) else _bare(own)


def _bare(signature: inspect.Signature) -> inspect.Signature:
    """Return the signature without types, as a sentence shows it."""
    parameters = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
    return inspect.Signature(parameters)


def _takes(signature: inspect.Signature, number: int) -> bool:
    try:
        signature.bind(*range(number))
    except TypeError:
        return False
    return True
