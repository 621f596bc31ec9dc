"""What a start finds in its run folder and leaves there: configuration, hashes of the data, the job, what an earlier run left."""

import os
from pathlib import Path

import pytest

from moetrain.base.errors import CheckpointError
from moetrain.base.files import write_whole
from moetrain.config import TrainConfig
from moetrain.config.origin import is_restart, origin, origin_run, remember_job, set_aside, settled_place
from moetrain.config.saved import require_same_run, saved_config, write_config
from moetrain.store.io import Io
from moetrain.store.manifest import SaveId
from moetrain.store.objects import CheckpointFolder, resolve

CONTENT = {"tokenizer": "2", "tokens of a": "1"}
SLURM = {"SLURM_JOB_ID": "7", "TORCHELASTIC_RUN_ID": "7.0", "TORCHELASTIC_RESTART_COUNT": "0"}


def with_save(folder: Path) -> Path:
    manifests = folder / "checkpoint" / "manifests"
    manifests.mkdir(parents=True)
    (manifests / f"{SaveId(1, 1)}.json").touch()
    return folder


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "config.yaml"
    write_whole(file, "old")

    def killed(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    write_whole(file, "old")  # nothing to do, so nothing is written
    with pytest.raises(KeyboardInterrupt):
        write_whole(file, "new")
    assert file.read_text() == "old"


def test_an_empty_configuration_is_none(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    assert saved_config(tmp_path) is None


@pytest.mark.parametrize("junk", [b":[", b"{", b"[1]\n", b"text\n", b"\xff\xfe"])
def test_a_configuration_that_is_none_is_damage_with_a_way_out(tmp_path: Path, junk: bytes) -> None:
    (tmp_path / "config.yaml").write_bytes(junk)
    with pytest.raises(
        CheckpointError, match=r"config\.yaml is damaged: it holds no configuration\. Bring it back from a copy, or remove it"
    ):
        saved_config(tmp_path)
    (tmp_path / "config.yaml").write_text("train: {unheard: 1}\n")
    with pytest.raises(CheckpointError, match=r"config\.yaml cannot be read: Key 'unheard' not in 'TrainingConfig'\. It may be of another"):
        saved_config(tmp_path)


def test_other_text_under_the_same_path_is_another_run(tmp_path: Path) -> None:
    config = TrainConfig()
    write_config(config, CONTENT, tmp_path, [])
    assert require_same_run(config, CONTENT, tmp_path) == config
    with pytest.raises(CheckpointError, match="tokens of a: 1 -> 9"):
        require_same_run(config, CONTENT | {"tokens of a": "9"}, tmp_path)
    config.checkpoint.allow_changes = True
    assert require_same_run(config, CONTENT | {"tokens of a": "9"}, tmp_path) is not None
    (tmp_path / "data.json").unlink()  # a run of an earlier version
    config.checkpoint.allow_changes = False
    assert require_same_run(config, CONTENT, tmp_path) is not None


def test_a_path_counts_until_the_run_has_a_recovery_point_of_its_own(tmp_path: Path) -> None:
    other, own = with_save(tmp_path / "other"), tmp_path / "own"
    assert origin(str(other), own, {}) == str(other)
    assert origin_run(str(other), own) == origin_run(str(other / "checkpoint"), own) == other
    with_save(own)
    assert origin(str(other), own, {}) == "auto"
    assert origin_run("auto", own) == own


@pytest.mark.parametrize("resume", ["auto", "must", "a path"])
def test_a_run_whose_checkpoints_are_gone_does_not_start_anew(tmp_path: Path, resume: str) -> None:
    """A disk that is not mounted looks like a run that has none."""
    run, place = tmp_path / "run", tmp_path / "mount" / "run"
    run.mkdir()
    (run / "checkpoint").write_text(f"{place}\n")
    (run / "metrics.jsonl").write_text('{"train/step": 1, "checkpoint/pending": 1}\n{"checkpoint/seq": 9, "checkpoint/bytes_read": "{}"}\n')
    resume = str(with_save(tmp_path / "other")) if resume == "a path" else resume
    assert origin(resume, run, {}) == resume
    with (run / "metrics.jsonl").open("a") as lines:
        lines.write('{"train/step": 2, "checkpoint/seq": 1, "checkpoint/bytes": 10}\n')
    with pytest.raises(CheckpointError, match=rf"has committed checkpoints, and there is none left in {place}\. Mount or move them back"):
        origin(resume, run, {})
    assert origin("never", run, {}) == "never"
    (place / "manifests").mkdir(parents=True)
    (place / "manifests" / f"{SaveId(1, 1)}.json").touch()
    assert origin(resume, run, {}) == ("must" if resume == "must" else "auto")


def test_without_a_recovery_point_nothing_is_compared(tmp_path: Path) -> None:
    assert origin_run("auto", tmp_path) is None
    assert origin_run("never", with_save(tmp_path)) is None


@pytest.mark.parametrize(
    "again", [{"SLURM_RESTART_COUNT": "1", "TORCHELASTIC_RUN_ID": "7.1"}, {"TORCHELASTIC_RESTART_COUNT": "2"}], ids=["requeue", "elastic"]
)
def test_never_holds_for_a_job_and_not_for_its_restarts(tmp_path: Path, again: dict[str, str]) -> None:
    assert origin("never", tmp_path, SLURM | again) == "never"  # it died before it began
    remember_job(tmp_path, SLURM)
    assert origin("never", tmp_path, SLURM | again) == "auto"
    assert origin("never", tmp_path, SLURM) == "never"  # a second start by hand in the same allocation
    assert origin("never", tmp_path, SLURM | again | {"SLURM_JOB_ID": "8"}) == "never"
    assert not is_restart(tmp_path, {})


def test_what_an_earlier_run_left_is_set_aside_and_its_job_loses_the_folder(tmp_path: Path) -> None:
    set_aside(tmp_path)
    assert list(tmp_path.iterdir()) == []
    for number in (1, 2):
        folder = CheckpointFolder(tmp_path / "checkpoint", Io())
        old = folder.claim(0.0)
        (tmp_path / "metrics.jsonl").write_text(f"{number}")
        (tmp_path / "experts").mkdir()
        set_aside(tmp_path)
        assert (tmp_path / f"metrics.jsonl.before-{number}").read_text() == f"{number}"
        assert (tmp_path / f"experts.before-{number}").is_dir() and not (tmp_path / "experts").exists()
        assert folder.claim(0.0).epoch == old.epoch + 1


def claimed(folder: str) -> None:
    """As a job leaves a checkpoint folder that it has used."""
    CheckpointFolder(Path(folder), Io()).claim(0.0)


def test_checkpoints_lie_where_the_configuration_says_and_every_command_finds_them(tmp_path: Path) -> None:
    run, wanted = tmp_path / "runs" / "first", str(tmp_path / "elsewhere")
    assert settled_place(run, "") == str(run / "checkpoint")
    run.mkdir(parents=True)
    assert settled_place(run, wanted) == f"{wanted}/first"
    claimed(f"{wanted}/first")
    assert settled_place(run, "") == settled_place(run, wanted) == f"{wanted}/first", "every later start goes on there"
    assert resolve(run) == Path(wanted, "first")
    with pytest.raises(CheckpointError, match="the checkpoints of this run lie in"):
        settled_place(run, str(tmp_path / "third"))


def test_a_run_that_starts_anew_gets_a_place_of_its_own(tmp_path: Path) -> None:
    run, wanted = tmp_path / "runs" / "first", str(tmp_path / "elsewhere")
    run.mkdir(parents=True)
    claimed(settled_place(run, wanted))
    set_aside(run)
    assert settled_place(run, wanted) == f"{wanted}/first-2"
    assert (run / "checkpoint.before-1").read_text() == f"{wanted}/first\n"
