"""Modules with another forward: the same object with the same parts, whose class has generated code for it."""

from __future__ import annotations

import linecache
from functools import cache
from typing import Any

import torch
from torch.fx import Graph

# How fx writes its own pickles: import statements for what the generated code names.
from torch.fx.graph_module import _format_import_block
from torch.package.importer import sys_importer


class Rewritten:
    """Mixed into a module's class: forward is generated from a graph, everything else is as it was.

    Attributes:
        forward_source: Python, with the imports that it needs.
    """

    forward_source = ""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # pickle and deepcopy find the class by its name; this one is made at run time.
        state = getattr(self, "__getstate__", lambda: self.__dict__)()
        return _rebuilt, (type(self).__bases__[1], self.forward_source), state


def rewrite(block: torch.nn.Module, graph: Graph) -> None:
    """Makes `graph`, of the block's own forward, what the block does; hooks, attributes and class checks stay."""
    graph.lint()
    code = graph.python_code("self")
    source = f"{_format_import_block(code.globals, sys_importer)}\n{code.src}"
    own = type(block).__bases__[1] if isinstance(block, Rewritten) else type(block)
    block.__class__ = _class(own, source)


@cache
def _class(own: Any, source: str) -> Any:
    name = f"<fused forward of {own.__qualname__} {hash(source):x}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)  # for tracebacks
    found: dict[str, Any] = {}
    exec(compile(source, name, "exec"), found)
    members = {
        "__module__": own.__module__,
        "__qualname__": own.__qualname__,
        "__doc__": own.__doc__,
        "forward": found["forward"],
        "forward_source": source,
    }
    return type(own.__name__, (Rewritten, own), members)


def _rebuilt(own: Any, source: str) -> Any:
    made = _class(own, source)
    return made.__new__(made)
