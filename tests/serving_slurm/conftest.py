"""These tests start a Slurm of their own: only who names this folder runs them (``make test-slurm``)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving_slurm.cluster import Cluster, missing

HERE = Path(__file__).parent


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    named = [(config.invocation_params.dir / argument.split("::")[0]).resolve() for argument in config.args]
    return None if any(HERE in (path, *path.parents) for path in named) else True


@pytest.fixture(scope="session")
def share() -> float:
    """How much of the seeded kills is run: EPFUSE_SLURM_SHARE, from 0 to 1; all of it if not given."""
    return float(os.environ.get("EPFUSE_SLURM_SHARE", "1"))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A Slurm without accounting."""
    yield from _running(tmp_path, accounting=False)


@pytest.fixture
def accounting_cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A Slurm with slurmdbd and a database."""
    yield from _running(tmp_path, accounting=True)


def _running(folder: Path, accounting: bool) -> Iterator[Cluster]:
    if (name := missing(accounting)) is not None:
        pytest.skip(f"{name} is not installed")
    with Cluster(folder / "slurm", accounting) as cluster:
        yield cluster
