"""`moetrain checkpoint VERB` in an interpreter that refuses torch, except where it converts."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moetrain.checkpoint.table import columns, duration, expert_table, size
from moetrain.cli import main
from moetrain.store.io import Io
from moetrain.store.manifest import Manifest, seal
from moetrain.store.objects import CheckpointFolder
from tests.unit.checkpoint_kit import BANKS, Job, flip

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


def moetrain(*arguments: object) -> int:
    return main(["checkpoint", *map(str, arguments)])


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


def test_show_draws_the_ages_as_a_map(run_folder, tmp_path):
    status, text = moetrain_checkpoint("show", run_folder, "--png", tmp_path / "ages.png")
    assert status == 0
    assert text.splitlines()[-1] == str(tmp_path / "ages.png")
    assert (tmp_path / "ages.png").read_bytes().startswith(b"\x89PNG")
    status, text = moetrain_checkpoint("show", run_folder, "--png", tmp_path / "none" / "ages.png")
    assert (status, text.startswith(f"{tmp_path / 'none' / 'ages.png'} cannot be drawn")) == (2, True)


def test_diff_says_what_was_written_anew(run_folder, said):
    first, _, third = points(run_folder)[::-1]
    status, text = said("diff", run_folder, 1, 3)
    assert status == 0
    lines = text.splitlines()
    assert lines[0].startswith("from seq 1 (step 10, full) to seq 3 (step 30, partial): +20 steps")
    assert "progress samples: 80 -> 240" in lines
    kept = first.objects.keys() & third.objects.keys()
    cells = {line.rsplit(maxsplit=3)[0].strip(): line.split()[-3:] for line in lines if line.startswith(("in both", "only in"))}
    assert cells["in both"][0] == str(len(kept))
    assert cells["only in seq 3"][0] == str(len(third.objects) - len(kept))
    table = lines.index(next(line for line in lines if line.startswith("experts written anew")))
    for bank, line in zip(BANKS, lines[table + 2 :], strict=False):
        marks = ["." if third.ages()[bank, expert] == 20 else "wm" for expert in range(4)]
        assert line.split() == [bank, *marks]
    assert "0>20" in text and "0>0" in text
    status, text = said("diff", run_folder, 2, 2)
    assert "+0 steps" in text and "wm" not in text


def test_a_recovery_point_is_named_by_number_or_pin(run_folder, said):
    assert said("pin", run_folder, "best", "--seq", 2) == (
        0,
        f"best keeps seq 2 (step 20), {size(points(run_folder)[1].total_bytes)}.\n",
    )
    assert "seq 2 " in said("show", run_folder, "--seq", "best")[1].splitlines()[0]
    _, text = said("list", run_folder)
    assert [line.split()[0] for line in text.splitlines() if line.endswith("best")] == ["2"]
    assert said("show", run_folder, "--seq", "worst") == (
        2, "worst is neither the number of a recovery point nor a pin. Pins: best; `moetrain checkpoint list` shows the numbers.\n"
    )  # fmt: skip
    assert said("unpin", run_folder, "best")[0] == 0
    assert said("unpin", run_folder, "best")[0] == 2


@pytest.mark.parametrize("command", [["show", "--seq"], ["diff", 1], ["convert", "--to", "dcp", "--out", "tree", "--seq"]])
def test_a_missing_recovery_point_and_a_damaged_one_are_told_apart(run_folder, said, command):
    verb, *more = command
    missing = f"There is no recovery point 9 in {run_folder / 'checkpoint'}. There are seq 1, 2, 3.\n"
    assert said(verb, run_folder, *more, 9) == (2, missing)
    file = run_folder / "checkpoint" / "manifests" / f"{points(run_folder)[1].save}.json"
    file.write_bytes(file.read_bytes()[:-40])
    status, text = said(verb, run_folder, *more, 2)
    assert (status, text.startswith(f"Recovery point 2 cannot be used: {file}"), "There are seq 1, 2, 3." in text) == (2, True, True)


def test_a_pin_of_a_recovery_point_that_is_gone_is_named(run_folder, said):
    said("pin", run_folder, "best", "--seq", 1)
    (run_folder / "checkpoint" / "manifests" / f"{points(run_folder)[2].save}.json").unlink()
    gone = "The pin best keeps seq 1, which is not there any more"
    for verb in ("show", "pin", "diff"):
        arguments = {"show": ["--seq", "best"], "pin": ["best", "--seq", "best"], "diff": ["best", 3]}[verb]
        status, text = said(verb, run_folder, *arguments)
        assert (status, text.startswith(f"{gone}. `moetrain checkpoint unpin RUN best` takes it away")) == (2, True)
    status, text = said("verify", run_folder)
    assert (status, gone in text) == (1, True)
    assert gone in said("list", run_folder)[1]
    said("unpin", run_folder, "best")
    assert "pin" not in said("verify", run_folder)[1]


def test_prune_keeps_the_newest_and_the_pinned(run_folder, said):
    said("pin", run_folder, "first", "--seq", 1)
    (run_folder / "DONE").touch()
    assert said("prune", run_folder, "--keep", 1) == (0, "1 recovery point removed, 2 kept.\n")
    assert [point.seq for point in points(run_folder)] == [3, 1]
    assert said("verify", run_folder)[0] == 0
    assert said("prune", run_folder, "--keep", 0)[0] == 2


def test_prune_refuses_to_leave_nothing_good(run_folder, said):
    def damage(point: Manifest, label: str) -> None:
        name = next(name for name, record in point.objects.items() if record.step == point.step and name.endswith(label))
        (run_folder / "checkpoint" / "objects" / name / "c.0").unlink()

    newest, middle, _ = points(run_folder)
    label = next(name.rpartition("/")[2] for name, record in newest.objects.items() if record.step == 30 and "dense" in name)
    (run_folder / "DONE").touch()
    damage(newest, label)
    status, text = said("prune", run_folder, "--keep", 1)
    assert (status, len(points(run_folder))) == (2, 3)
    assert "seq 3: " in text and label in text and "Nothing was removed. seq 2 is good: pin it" in text
    status, text = said("prune", run_folder, "--keep", 2)
    assert (status, [point.seq for point in points(run_folder)]) == (1, [3, 2])
    assert "These are kept and damaged; an older one is good.\nseq 3: " in text
    assert said("verify", run_folder)[1].count("good") == 1
    damage(middle, label)
    status, text = said("prune", run_folder, "--keep", 1)
    assert (status, "No other one is good either" in text, len(points(run_folder))) == (2, True, 2)


def test_prune_reads_what_it_leaves(run_folder, said):
    (run_folder / "DONE").touch()
    newest = points(run_folder)[0]
    flip(next(file for name in newest.objects for file in (run_folder / "checkpoint" / "objects" / name).glob("c.0")), 5)
    assert said("prune", run_folder, "--keep", 1)[0] == 2
    assert len(points(run_folder)) == 3


def test_prune_leaves_a_folder_alone_that_a_living_job_claims(run_folder):
    """The job is this process, which claimed it in the fixture."""
    status, text = moetrain_checkpoint("prune", run_folder, "--keep", 1)
    assert (status, len(points(run_folder))) == (2, 3)
    assert text.startswith(f"Process {os.getpid()} on ") and "may be writing to" in text
    assert moetrain_checkpoint("diff", run_folder, 1, 3)[0] == 0
    assert moetrain_checkpoint("pin", run_folder, "newest")[0] == 0
    assert moetrain_checkpoint("prune", run_folder, "--keep", 1, "--take-over")[0] == 0
    assert len(points(run_folder)) == 1


def test_prune_asks_first_where_the_claims_are_gone_and_then_claims_above_what_is_there(run_folder, said):
    job = Job(run_folder / "checkpoint", 2, 2)
    job.load()
    job.save(40)
    shutil.rmtree(run_folder / "checkpoint" / "claims")
    status, text = said("prune", run_folder, "--keep", 1)
    assert (status, [point.seq for point in points(run_folder)]) == (2, [4, 3, 2])
    assert text.startswith("A job whose claim is gone may be writing to") and "--take-over" in text
    assert said("prune", run_folder, "--keep", 1, "--take-over")[0] == 0
    assert [path.name for path in (run_folder / "checkpoint" / "claims").iterdir()] == ["000003"]
    assert [point.seq for point in points(run_folder)] == [4]


def claimed_elsewhere(checkpoint: Path) -> None:
    """The newest claim is one of another machine: nobody here knows whether its job is alive."""
    owner = {"host": "elsewhere", "pid": os.getpid(), "time": 0.0}
    (checkpoint / "claims" / "000002").write_bytes(seal(json.dumps(owner).encode()))


def test_whether_a_run_is_done_is_looked_up_in_the_run_and_not_beside_its_checkpoints(run_folder, tmp_path, said):
    place, run = tmp_path / "elsewhere" / "checkpoint", tmp_path / "run"
    run.mkdir()
    shutil.copytree(run_folder / "checkpoint", place)
    (run / "checkpoint").write_text(f"{place}\n")
    claimed_elsewhere(place)
    (place.parent / "DONE").touch()  # of nobody
    for folder in (run, place):
        assert said("prune", folder, "--keep", 2)[0] == 2
    (run / "DONE").touch()
    assert said("prune", run, "--keep", 2) == (0, "1 recovery point removed, 2 kept.\n")


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


@pytest.mark.parametrize("verb", ["list", "show", "verify", "diff", "pin", "unpin", "prune", "convert"])
def test_every_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit):
        moetrain(verb, "--help")
    assert f"moetrain checkpoint {verb}" in capsys.readouterr().out


def test_a_folder_without_checkpoint_is_one_sentence(tmp_path):
    status, text = moetrain_checkpoint("list", tmp_path)
    assert status == 2
    assert text.startswith(f"There is no checkpoint in {tmp_path}.")


def test_verify_and_list_say_which_manifest_is_missing(run_folder, said):
    newest, middle, _ = points(run_folder)
    file = run_folder / "checkpoint" / "manifests" / f"{newest.save}.json"
    content = file.read_bytes()
    file.unlink()
    status, text = said("verify", run_folder)
    assert (status, "seq 3: MISSING, every rank wrote" in text, text.count("good")) == (1, True, 2)
    assert "seq 3: MISSING" in said("list", run_folder)[1]
    file.with_name(f"{middle.save}.json").unlink()
    file.write_bytes(content)
    status, text = said("verify", run_folder)
    assert (status, "seq 2: MISSING, although seq 1 is there" in text) == (1, True)


def test_verify_takes_no_interrupted_save_for_a_missing_one(run_folder, said):
    newest = points(run_folder)[0]
    (run_folder / "checkpoint" / "manifests" / f"{newest.save}.json").unlink()
    (run_folder / "checkpoint" / "receipts" / str(newest.save) / "00001.json").unlink()
    assert said("verify", run_folder)[0] == 0


def test_verify_misses_nothing_that_was_swept_beside_a_pin(run_folder, said):
    job = Job(run_folder / "checkpoint", 2, 2)
    job.load()
    said("pin", run_folder, "first", "--seq", 1)
    job.save(40)
    said("prune", run_folder, "--keep", 1, "--take-over")
    said("unpin", run_folder, "first")
    assert [point.seq for point in points(run_folder)] == [4, 1]
    assert said("verify", run_folder)[0] == 0


def test_prune_names_the_damaged_recovery_point_for_which_nothing_is_removed(run_folder, said):
    said("pin", run_folder, "best", "--seq", 2)
    file = run_folder / "checkpoint" / "manifests" / f"{points(run_folder)[1].save}.json"
    file.write_text("")
    status, text = said("prune", run_folder, "--keep", 1, "--take-over")
    assert (status, "No object was removed" in text, str(file) in text) == (1, True, True)


@pytest.mark.parametrize("place", ["x" * 300, "no text"])
def test_what_cannot_be_read_is_a_sentence(tmp_path, said, place):
    (tmp_path / "no text").mkdir()
    (tmp_path / "no text" / "checkpoint").write_bytes(b"\xff\xfe")
    status, text = said("list", tmp_path / place)
    assert (status, str(tmp_path / place) in text) == (2, True)
    assert said("agent", "status", tmp_path / place)[0] == 2


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


def test_a_map_gets_the_name_that_was_asked_for(run_folder, tmp_path, said):
    assert said("show", run_folder, "--png", tmp_path / "ages")[0] == 0
    assert (tmp_path / "ages").read_bytes().startswith(b"\x89PNG")


def test_a_pin_that_is_refused_leaves_nothing(run_folder, said):
    (run_folder / "checkpoint" / "gc").mkdir(exist_ok=True)
    (run_folder / "checkpoint" / "gc" / "000001-00000003.manifests.json").write_bytes(b"junk\n")
    assert said("pin", run_folder, "best")[0] == 2
    assert CheckpointFolder(run_folder / "checkpoint", Io()).pins() == {}


def test_tables_align_and_leave_gaps():
    assert expert_table({("a", 0): 5, ("a", 1): 100, ("b", 1): 7}) == ["expert  0    1", "a       5  100", "b       -    7"]
    assert columns([["x", "y"], ["long", "1"]]) == ["x     y", "long  1"]
    assert [size(999), size(5_400), size(3.2e6), size(7e9), duration(5), duration(600), duration(9000)] == [
        "999 B", "5.4 kB", "3.2 MB", "7.0 GB", "5 s", "10 min", "2.5 h"
    ]  # fmt: skip
