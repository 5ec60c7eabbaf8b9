"""Releases and reviewers at the same time; sixteen at once are in ``tests/soak``."""

import importlib
from pathlib import Path

import pytest
from invariants import Place
from pydantic import SecretStr
from releases import changed_notebook

pytestmark = [pytest.mark.services, pytest.mark.slow, pytest.mark.thorough]


@pytest.fixture
def races(monkeypatch):
    """The soak's module; it is a script's, not a package's."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "soak"))
    return importlib.import_module("races")


def test_two_releases_at_once_are_complete_and_the_alias_has_one_answer(
    races, make_settings, mlflow_server, small, s3, bucket, tmp_path
):
    update = {"mlflow_tracking_uri": SecretStr(mlflow_server)}
    settings = make_settings("home").model_copy(update=update)
    place = Place(settings, bucket.name, name=bucket.name)
    notebook = changed_notebook(tmp_path)
    assert races.release_together(place, settings, small, notebook, 2) == []
    moved = races.move_together(place, 8, seed=0)
    assert moved.violations == []
    assert moved.survived >= 1
