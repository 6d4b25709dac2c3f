"""Checks of a worker class: the names of its attributes, the parameters of its methods, and its constructor."""

import inspect
from collections.abc import Callable, Collection, Iterator
from difflib import get_close_matches
from functools import partial
from types import CodeType, FunctionType
from typing import Any

from .errors import InvalidWorker
from .worker import snake_case

_MOST_LAYERS = 50  # a wrapper may wrap itself
_ANYTHING = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
_POSITIONAL = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}
_NEAR = 0.8  # of 1, by difflib: max_attemps and tiemout are near, handle_one and first_name are not


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
    return next(iter(get_close_matches(name.lower(), known, n=1, cutoff=_NEAR)), plain.get(spelt))


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
    found = inspect.getattr_static(cls, name)
    expected = f"{name}({', '.join(('self', *parameters))})"
    function, number = _function(found, cls), len(parameters) + (not isinstance(found, staticmethod))
    if not callable(function):
        raise InvalidWorker(f"{cls.__name__}.{name} is {found!r:.100}; expected a method: write def {expected}.")
    if _is_generator(function):
        raise InvalidWorker(
            f"{cls.__name__}.{name} is a generator, so calling it does nothing; expected a method "
            "that does its work when it is called: move the generator into a helper, and loop over it."
        )
    if not isinstance(found, FunctionType | classmethod | staticmethod):
        number = len(parameters)
    if (signature := _signature(function)) and not _can_be_given(function, signature, number):
        kind = "@staticmethod " if isinstance(found, staticmethod) else ""
        raise InvalidWorker(
            f"{cls.__name__}.{name} is declared as {kind}{name}{signature}; expected {expected}: "
            f"it is called with {' and '.join(f'the {each}' for each in parameters)} alone."
        )


def _function(found: Any, cls: type) -> Any:
    """Return the function itself. For another kind of attribute, return the value that an instance has."""
    if isinstance(found, FunctionType | property):
        return found
    if isinstance(found, classmethod | staticmethod):
        return found.__func__
    return found.__get__(object(), cls) if hasattr(found, "__get__") else found


def check_constructor(cls: type) -> None:
    """Raise InvalidWorker for a class that cannot be called without arguments."""
    signature = _signature(cls)
    if signature and not _takes(signature, 0):
        raise InvalidWorker(
            f"{cls.__name__}{signature} needs arguments; expected a class that is called without any: "
            "ask for a service where it is used, by context.services.get(...)."
        )


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    """Return the parameters of a call. None if they are unknown, as for some built-in functions.

    A wrapper that passes on all its arguments has the parameters of the function that it wraps.
    """
    try:
        signatures = [_bare(inspect.signature(each, follow_wrapped=False)) for each in _layers(function)]
    except (TypeError, ValueError):
        return None
    own = (each for each in signatures if {one.kind for one in each.parameters.values()} - _ANYTHING)
    return next(own, signatures[-1])


def _bare(signature: inspect.Signature) -> inspect.Signature:
    """Return the signature without types, as a sentence shows it."""
    parameters = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
    return inspect.Signature(parameters)


def _can_be_given(function: Any, signature: inspect.Signature, number: int) -> bool:
    """Return whether a call with `number` arguments suits `signature`.

    A wrapper may add arguments of its own, so the function below it may need more.
    """
    if _bare(inspect.signature(function, follow_wrapped=False)) == signature:
        return _takes(signature, number)
    kinds = [each.kind for each in signature.parameters.values()]
    positional = [kind for kind in kinds if kind in _POSITIONAL]
    return len(positional) >= number or inspect.Parameter.VAR_POSITIONAL in kinds


def _takes(signature: inspect.Signature, number: int) -> bool:
    try:
        signature.bind(*range(number))
    except TypeError:
        return False
    return True


def _is_generator(function: Callable[..., Any]) -> bool:
    """Return whether the function has a `yield`, also below decorators and partial functions."""
    return any(inspect.isgeneratorfunction(each) or inspect.isasyncgenfunction(each) for each in _layers(function))


def _layers(function: Any) -> list[Any]:
    """Return the function, then the function that it wraps, and so on."""
    layers: list[Any] = []
    while function is not None and len(layers) < _MOST_LAYERS:
        layers.append(function)
        function = function.func if isinstance(function, partial) else getattr(function, "__wrapped__", None)
    return layers
