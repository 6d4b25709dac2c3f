"""URL rules that all applications of one process share, because compiling them takes most of `create_app`."""

from collections.abc import Callable

from flask import Flask
from werkzeug.routing import Rule

_builders: dict[object, Callable[..., tuple[str, str]]] = {}


class CompiledOnce(Rule):
    """A rule that shares its address builders with every equal rule."""

    def _compile_builder(self, append_unknown: bool = True) -> Callable[..., tuple[str, str]]:
        key = (self.rule, tuple(self._trace), repr(self.defaults), append_unknown)
        if key not in _builders:
            _builders[key] = super()._compile_builder(append_unknown)
        return _builders[key]


Flask.url_rule_class = CompiledOnce
