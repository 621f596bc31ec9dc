"""`moetrain checkpoint convert`: recovery points as DCP checkpoints, and back."""

import shutil
import subprocess
import sys
from pathlib import Path

from moetrain.store.manifest import Manifest
from moetrain.store.objects import CheckpointFolder
from tests.unit.checkpoint_kit import Job
from tests.unit.command_kit import ROOT, claimed_elsewhere, moetrain, points


def test_a_convert_with_nothing_new_says_so(run_folder, tmp_path, said):
    assert said("convert", run_folder, "--to", "dcp", "--out", tmp_path / "tree")[1].count("seq") == 3
    assert said("convert", run_folder, "--to", "dcp", "--out", tmp_path / "tree") == (
        0, f"{tmp_path / 'tree'} has every recovery point already.\n"
    )  # fmt: skip


def test_convert_asks_the_run_whether_it_is_done(run_folder, tmp_path, said):
    assert said("convert", run_folder, "--to", "dcp", "--out", tmp_path / "one", "--seq", 2)[0] == 0
    place, run = tmp_path / "elsewhere" / "checkpoint", tmp_path / "run"
    run.mkdir()
    shutil.copytree(run_folder / "checkpoint", place)
    (run / "checkpoint").write_text(f"{place}\n")
    claimed_elsewhere(place)
    assert said("convert", tmp_path / "one", "--from", "dcp", "--out", run)[0] == 2
    (run / "DONE").touch()
    assert said("convert", tmp_path / "one", "--from", "dcp", "--out", run)[0] == 0


def test_convert_publishes_what_is_new_and_reads_back(run_folder, tmp_path, capsys):
    job = Job(run_folder / "checkpoint", 2, 2, keep=10)
    assert moetrain("convert", run_folder, "--to", "dcp", "--out", tmp_path / "tree") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [str(tmp_path / "tree" / f"step-{step}") for step in (10, 20, 30)]
    job.load("must")
    job.save(40)
    assert moetrain("convert", run_folder, "--to", "dcp", "--out", tmp_path / "tree") == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'tree' / 'step-40'}: seq ")
    assert moetrain("convert", run_folder, "--to", "dcp", "--out", tmp_path / "one", "--seq", 2) == 0
    assert "step 20" in capsys.readouterr().out
    assert moetrain("convert", tmp_path / "tree" / "step-40", "--from", "dcp", "--out", tmp_path / "fresh") == 0
    assert "step 40" in capsys.readouterr().out
    (back,), newest = points(tmp_path / "fresh"), points(run_folder)[0]
    assert (back.step, back.ages()) == (40, newest.ages())


def test_convert_into_a_run_asks_whether_its_job_is_alive(run_folder, tmp_path):
    """The job is this process."""
    assert moetrain("convert", run_folder, "--to", "dcp", "--out", tmp_path / "one", "--seq", 2) == 0
    command = [sys.executable, "-m", "moetrain.cli", "checkpoint", "convert", tmp_path / "one", "--from", "dcp", "--out", run_folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, len(points(run_folder))) == (2, 3)
    assert "may be writing to" in done.stderr
    done = subprocess.run([*command, "--take-over"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    assert points(run_folder)[0].step == 20


def test_convert_passes_over_a_damaged_recovery_point(run_folder, tmp_path, capsys):
    name = next(name for name, record in points(run_folder)[0].objects.items() if record.step == 30)
    (run_folder / "checkpoint" / "objects" / name / "c.0").write_bytes(b"")
    assert moetrain("convert", run_folder, "--to", "dcp", "--out", tmp_path / "tree") == 1
    assert "seq 3 is not published" in capsys.readouterr().out
    assert (tmp_path / "tree" / "step-20" / ".metadata").exists()
    assert not (tmp_path / "tree" / "step-30" / ".metadata").exists()


def test_convert_passes_over_what_a_running_job_sweeps_meanwhile(run_folder, tmp_path, capsys, monkeypatch):
    from moetrain.checkpoint.dcp import Tree

    add, folder = Tree.add, run_folder / "checkpoint"

    def swept(tree: Tree, source: CheckpointFolder, point: Manifest) -> Path:
        if point.seq == 1:
            (folder / "manifests" / f"{point.save}.json").unlink()
            shutil.rmtree(folder / "objects" / next(name for name, record in point.objects.items() if "dense" in name))
        return add(tree, source, point)

    monkeypatch.setattr(Tree, "add", swept)
    assert moetrain("convert", run_folder, "--to", "dcp", "--out", tmp_path / "tree") == 0
    assert [line.split(":")[1].split(",")[0] for line in capsys.readouterr().out.splitlines()] == [" seq 2", " seq 3"]


def test_mistakes_of_convert_are_sentences(run_folder, tmp_path, capsys):
    assert moetrain("convert", tmp_path, "--from", "dcp", "--out", run_folder) == 2
    assert "no DCP checkpoint" in capsys.readouterr().err
    assert moetrain("convert", run_folder, "--from", "dcp", "--out", tmp_path / "x", "--seq", 1) == 2
    assert "--seq goes with --to" in capsys.readouterr().err
    assert moetrain("convert", run_folder, "--to", "dcp", "--out", run_folder, "--seq", 1) == 2
    assert "exists" in capsys.readouterr().err
    for place, more in (("checkpoint", []), ("checkpoint/tree", []), ("checkpoint/one", ["--seq", 1])):
        assert moetrain("convert", run_folder, "--to", "dcp", "--out", run_folder / place, *more) == 2
        assert "lies in the checkpoint folder" in capsys.readouterr().err
    assert {path.name for path in (run_folder / "checkpoint").iterdir()} <= {"claims", "manifests", "objects", "receipts", "gc"}


def test_convert_says_in_a_sentence_what_it_cannot_write(run_folder, tmp_path, said):
    (tmp_path / "file").touch()
    for more in ([], ["--seq", 2]):
        status, text = said("convert", run_folder, "--to", "dcp", "--out", tmp_path / "file" / "tree", *more)
        assert (status, "cannot be used: Not a directory" in text) == (2, True)


def test_convert_passes_by_copies_in_a_tree_and_fills_a_place_that_is_empty(run_folder, tmp_path, said):
    tree = tmp_path / "tree"
    assert said("convert", run_folder, "--to", "dcp", "--out", tree)[0] == 0
    shutil.copytree(tree / "step-30", tree / "step-30.bak")
    shutil.rmtree(tree / "step-30")
    assert said("convert", run_folder, "--to", "dcp", "--out", tree)[0] == 0
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "checkpoint").write_text(f"{tmp_path / 'elsewhere'}\n")
    assert said("convert", tree / "step-30", "--from", "dcp", "--out", tmp_path / "far")[0] == 0
    assert (tmp_path / "elsewhere" / "manifests").is_dir()
