"""The attributes of every migration."""

from pathlib import Path

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory

FOLDER = Path(__file__).parents[2] / "migrations"


def config() -> Config:
    """Return Alembic's configuration of this checkout."""
    made = Config()
    made.set_main_option("script_location", str(FOLDER))
    return made


SCRIPTS = {script.revision: script for script in ScriptDirectory.from_config(config()).walk_revisions()}


@pytest.mark.parametrize("revision", sorted(SCRIPTS))
def test_each_migration_declares_if_the_release_before_can_run_on_it(revision: str) -> None:
    """C15: `release_before_runs` is True or False: a rolled-back process is accepted or rejected by it."""
    says = getattr(SCRIPTS[revision].module, "release_before_runs", None)
    assert says is True or says is False, (
        f"{SCRIPTS[revision].path}: set release_before_runs = True if processes of the release before can "
        "read and write this schema, else False"
    )


def test_the_migrations_are_one_line_without_a_gap() -> None:
    """Each migration follows the one with the number before it, and the first follows none."""
    numbers = sorted(SCRIPTS)
    assert numbers == [f"{number:04}" for number in range(5, len(numbers) + 5)]
    for before, revision in zip([None, *numbers], numbers, strict=False):
        assert SCRIPTS[revision].down_revision == before
    assert SCRIPTS["0005"].module.release_before_runs is False
