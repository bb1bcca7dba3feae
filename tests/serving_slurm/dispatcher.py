"""``python -m tests.serving_slurm.dispatcher RUN``: a dispatcher of stub jobs, to be killed."""

from __future__ import annotations

import sys
from pathlib import Path

from epfuse.serving.dispatch import Dispatcher
from epfuse.serving.launchers.slurm import SlurmLauncher
from epfuse.serving.layout import RunFolder
from epfuse.serving.patience import Rules
from epfuse.serving.point import Slurm
from tests.serving import stub_job
from tests.serving.small_runs import open_run

RULES = Rules(poll=0.3, attempts=20, identical=10**9, outage=300, longest_pause=2.0, hopeless=3.0, ask_again=2.0)
JOB = (sys.executable, stub_job.__file__)


def dispatcher(folder: RunFolder, **slurm: object) -> Dispatcher:
    """Of a run, with its lock and journal taken."""
    _, journal = open_run(folder)
    launcher = SlurmLauncher(Slurm(exclusive=False, **slurm))  # type: ignore[arg-type]
    return Dispatcher(folder, folder.read_run(), journal, launcher, JOB, RULES, say=print)


if __name__ == "__main__":
    now = dispatcher(RunFolder(Path(sys.argv[1])))
    now.dispatch()
    sys.exit(now.unfinished or 0)
