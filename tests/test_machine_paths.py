"""No test leans on what a machine has or has not: of absolute paths only the kernel's own are named."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
ABSOLUTE = re.compile(r"/(\w[\w.-]*)(/|$)")
OF_THE_KERNEL = {"dev", "proc"}
ROUTES = {"collective_rpc", "favicon.ico", "health", "metrics", "start_profile", "stop_profile", "v1"}
"""Of servers: paths of a URL and not of a file."""


def test_paths_of_tests_are_in_their_own_folders() -> None:
    found = []
    for file in TESTS.rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        joined = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in joined:
                path = ABSOLUTE.match(node.value)
                if path is not None and path[1] not in OF_THE_KERNEL | ROUTES:
                    found.append(f"{file.relative_to(TESTS)}:{node.lineno} has {node.value!r}")
    assert not found
