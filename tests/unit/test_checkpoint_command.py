"""`moetrain checkpoint list|show|verify` in an interpreter that refuses torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from moetrain.checkpoint.table import columns, duration, expert_table, size
from moetrain.store.io import Io
from moetrain.store.manifest import Manifest
from moetrain.store.objects import CheckpointFolder
from tests.unit.checkpoint_kit import BANKS, Job

ROOT = Path(__file__).parents[2]
PROGRAM = """
import argparse, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError("torch is blocked")
sys.meta_path.insert(0, Blocked())
from moetrain.base.errors import MoetrainError
from moetrain.checkpoint.command import add_parsers
parser = argparse.ArgumentParser()
add_parsers(parser.add_subparsers())
arguments = parser.parse_args(["checkpoint", *sys.argv[1:]])
try:
    sys.exit(arguments.run(arguments))
except MoetrainError as error:
    print(error)
    sys.exit(2)
"""


def moetrain_checkpoint(*arguments: object) -> tuple[int, str]:
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert not done.stderr
    return done.returncode, done.stdout


@pytest.fixture
def run_folder(tmp_path):
    job = Job(tmp_path / "checkpoint", 2, 2)
    for step in (10, 20, 30):
        job.save(step)
    return tmp_path


def points(run_folder: Path) -> list[Manifest]:
    return [point for point in CheckpointFolder(run_folder / "checkpoint", Io()).history() if isinstance(point, Manifest)]


def test_list_has_one_line_for_each_recovery_point(run_folder):
    status, text = moetrain_checkpoint("list", run_folder)
    assert status == 0
    _, *lines = [line.split() for line in text.splitlines()]
    assert [line[:3] for line in lines] == [["3", "30", "partial"], ["2", "20", "partial"], ["1", "10", "full"]]
    assert [line[7] for line in lines] == ["20", "10", "0"]
    newest = points(run_folder)[0]
    assert size(newest.new_bytes) in text
    assert size(newest.total_bytes) in text


def test_show_has_the_age_and_adam_step_of_every_expert(run_folder):
    status, text = moetrain_checkpoint("show", run_folder / "checkpoint", "--seq", 2)
    assert status == 0
    assert "step 20, partial" in text
    assert "by 2 ranks, ep 2" in text
    assert "samples 160" in text
    point = points(run_folder)[1]
    for table in (expert_table(point.ages()), expert_table(point.adam_steps())):
        assert all(line in text for line in table)
    assert len({age for age in point.ages().values()}) == 2


def test_verify_reads_everything_and_names_what_is_damaged(run_folder):
    status, text = moetrain_checkpoint("verify", run_folder)
    assert status == 0
    assert text.count("good") == 3
    newest = points(run_folder)[0]
    name = next(name for name, record in newest.objects.items() if record.step == 30 and BANKS[1] in name)
    file = run_folder / "checkpoint" / "objects" / name / "c.0"
    file.write_bytes(file.read_bytes()[:-1])
    status, text = moetrain_checkpoint("verify", run_folder)
    assert status == 1
    assert "seq 3, step 30: DAMAGED" in text
    assert name in text
    assert text.count("good") == 2
    (run_folder / "checkpoint" / "manifests" / f"{newest.save}.json").write_text("")
    status, text = moetrain_checkpoint("verify", run_folder)
    assert status == 1
    assert "seq 3: DAMAGED" in text
    assert moetrain_checkpoint("list", run_folder)[0] == 1


def test_a_folder_without_checkpoint_is_one_sentence(tmp_path):
    status, text = moetrain_checkpoint("list", tmp_path)
    assert status == 2
    assert text.startswith(f"There is no checkpoint in {tmp_path}.")


def test_tables_align_and_leave_gaps():
    assert expert_table({("a", 0): 5, ("a", 1): 100, ("b", 1): 7}) == ["expert  0    1", "a       5  100", "b       -    7"]
    assert columns([["x", "y"], ["long", "1"]]) == ["x     y", "long  1"]
    assert [size(999), size(5_400), size(3.2e6), size(7e9), duration(5), duration(600), duration(9000)] == [
        "999 B", "5.4 kB", "3.2 MB", "7.0 GB", "5 s", "10 min", "2.5 h"
    ]  # fmt: skip
