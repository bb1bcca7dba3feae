"""The fixture of the tuner's tests."""

from tests.tuning.conftest import tables

__all__ = ["tables"]
