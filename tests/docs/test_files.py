"""The page of file formats names classes that are there: a class that gets another name is found without the site."""

from __future__ import annotations

import importlib

import pytest
from tools.site import tables


@pytest.mark.parametrize("form", tables.FORMS, ids=lambda form: form.title)
def test_every_class_of_a_file_is_there(form: tables.Form) -> None:
    for module, names in form.classes.items():
        loaded = importlib.import_module(module)
        assert [name for name in names if getattr(loaded, name, None) is None] == []
