"""kill -9 at every file operation of a save, and of trainers with real agents: nothing is lost, nothing is left."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> dict:
    command = [sys.executable, "-m", "tests.unit.checkpoint_crash", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


@pytest.mark.chaos
def test_a_kill_at_any_file_operation_leaves_the_last_or_the_new_checkpoint(tmp_path):
    found = run("hooks", str(tmp_path))
    assert found["exit"] == 0
    assert found["final"] == 4
    assert len(found["steps"]) > 40
    assert found["steps"] == sorted(found["steps"])  # there is one operation after which the new one exists
    assert set(found["steps"]) == {3, 4}


@pytest.mark.chaos
def test_killed_trainers_leave_no_process_no_memory_and_a_good_checkpoint(tmp_path):
    found = run("trainers", str(tmp_path), "20")
    assert found["killed_with_agent"] == 20
    assert found["steps"] == sorted(found["steps"])
    assert found["steps"][-1] > 1
    assert found["leaks"] == []
