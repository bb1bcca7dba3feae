"""``python3 -m epfuse.serving.patched PROGRAM ARGUMENT...``: patch this environment's vLLM, then become the program.

For images into which epfuse is mounted: the container is new at every start, and so is the vLLM in it.
"""

from __future__ import annotations

import os
import subprocess
import sys


def main(argv: list[str]) -> int:
    """Replace this process by the program, unless the patch fails."""
    if not argv:
        print("usage: python3 -m epfuse.serving.patched PROGRAM ARGUMENT...", file=sys.stderr)
        return 2
    done = subprocess.run([sys.executable, "-m", "epfuse", "vllm", "patch", "apply"], check=False)
    if done.returncode:
        return done.returncode
    os.execvp(argv[0], argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
