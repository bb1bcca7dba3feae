"""Run kernels of the peers' harness on one layer after another, in one process: imports are paid once.

    python -m tools.peer_driver compile|time

A child of tools/peer_process.py. It reads tasks from stdin, one a line as JSON. It prints what the harness prints,
``FAILED`` with a reason if the task raised, and ``END``.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def load(path: str) -> ModuleType:
    """A copy of the harness as a module of its own: it reads its sizes when it is loaded."""
    spec = importlib.util.spec_from_file_location(f"harness_{Path(path).stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def keep_references(module: ModuleType) -> None:
    """Let kernels of one layer share what float64 gives for the same tokens."""
    once, known = module.reference, {}

    def reference(case: Any) -> Any:
        key = case.T, float(case.hidden[0, 0])
        if key not in known:
            known.clear() if len(known) > 12 else None
            known[key] = once(case)
        return known[key]

    module.reference = reference


def free() -> None:
    """Give back what the last kernel held."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def main(phase: str) -> None:
    """Run tasks as they come."""
    last, module = None, None
    for line in sys.stdin:
        task = json.loads(line)
        os.environ.update(task["environment"])
        if task["harness"] != last or module is None:
            module = None  # its weights go before those of the next layer come
            free()
            last, module = task["harness"], load(task["harness"])
            if hasattr(module, "reference"):
                keep_references(module)
        try:
            module.child(task["kernel"], phase, task["tokens"])
        except Exception as error:
            if any(word in str(error) for word in ("CUDA error", "illegal memory")):
                raise  # nothing more can run in this process
            print("FAILED", " ".join(f"{type(error).__name__}: {error}".split())[:300], flush=True)
        free()
        print("END", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
