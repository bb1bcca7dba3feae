"""A launcher that a test kills: ``python -m tests.parallel.launcher FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

from epfuse.parallel.launch import Placement, launch_ranks
from tests.parallel.entries import have_children

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    launch_ranks(have_children, (folder,), ranks=2, placement=Placement.CPU, log_dir=folder)
