"""`moetrain checkpoint prune` removes what it was asked to, and nothing that is needed."""

import os
import shutil

from moetrain.store.manifest import Manifest
from tests.unit.checkpoint_kit import Job, flip
from tests.unit.command_kit import claimed_elsewhere, moetrain_checkpoint, points


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


def test_prune_names_the_damaged_recovery_point_for_which_nothing_is_removed(run_folder, said):
    said("pin", run_folder, "best", "--seq", 2)
    file = run_folder / "checkpoint" / "manifests" / f"{points(run_folder)[1].save}.json"
    file.write_text("")
    status, text = said("prune", run_folder, "--keep", 1, "--take-over")
    assert (status, "No object was removed" in text, str(file) in text) == (1, True, True)
