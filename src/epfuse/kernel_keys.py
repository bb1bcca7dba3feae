"""Triton's keys of kernels, made the same in every process.

Triton hashes a kernel's source and the functions that it calls when it first needs that, and keeps the hash. The
constants of a module (``tl.constexpr``) count in it only for functions that had been hashed before they were reached
(`DependenciesFinder._update_hash` takes a function's constants before it hashes the function). So the key of a kernel
depended on which kernels a process had looked for before: what one process had compiled another looked for in vain.
"""

from __future__ import annotations

import ast
from typing import Any

from triton.runtime.jit import JITCallable


def settle_key(function: Any) -> None:
    """Have Triton hash what ``function`` calls, and what that calls, before ``function`` itself.

    Args:
        function: a kernel, or another function of Triton's that has not been hashed yet or by this alone.
    """
    if function.hash is not None:
        return
    _settle(function, set())


def _settle(function: Any, begun: set[int]) -> None:
    begun.add(id(function))
    for name in sorted({node.id for node in ast.walk(function.parse()) if isinstance(node, ast.Name)}):
        called = function.__globals__.get(name)
        if isinstance(called, JITCallable) and called.hash is None and id(called) not in begun:
            _settle(called, begun)
    _ = function.cache_key  # a property: it hashes
