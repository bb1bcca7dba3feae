"""Where jobs run: `local` and `ssh` start processes, `slurm` submits batch jobs."""
