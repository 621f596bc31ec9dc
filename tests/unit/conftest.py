"""What several tests of `moetrain checkpoint VERB` start from."""

import pytest

from tests.unit.checkpoint_kit import Job
from tests.unit.command_kit import moetrain


@pytest.fixture
def said(capsys):
    """Runs a command in this process: exit status and what it said."""

    def run(*arguments: object) -> tuple[int, str]:
        status = moetrain(*arguments)
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return run


@pytest.fixture
def run_folder(tmp_path):
    job = Job(tmp_path / "checkpoint", 2, 2)
    for step in (10, 20, 30):
        job.save(step)
    return tmp_path
