"""Which recovery points a run has gone through: what others hold is of another course, and repairs and completes nothing."""

import errno
import json
from pathlib import Path

import pytest

from moetrain.base.errors import CheckpointError
from moetrain.checkpoint.config import CheckpointConfig
from moetrain.checkpoint.job import SaveJob
from moetrain.checkpoint.prune import check_rest
from moetrain.checkpoint.recover import agreed_choice
from moetrain.checkpoint.turns import Horizon, Turns
from moetrain.store.backend import FolderBackend, NoAnswer
from moetrain.store.encode import ArrayReader
from moetrain.store.io import Io
from moetrain.store.manifest import seal, unseal
from moetrain.store.objects import CheckpointFolder
from tests.unit.checkpoint_kit import (
    BANKS,
    NUM_EXPERTS,
    Job,
    LocalNode,
    assert_equal,
    expected,
    experts_by_step,
    flip,
    manifests,
    objects_of,
)

LOAD = [[10] * NUM_EXPERTS] * len(BANKS)  # of every step


def counting(folder: Path, **options) -> Job:
    """A job of one rank that counts what experts are trained on."""
    turns = Turns(CheckpointConfig(), Horizon(dict.fromkeys(BANKS, NUM_EXPERTS), 10_000))
    return Job(folder, 1, 1, turns=turns, **options)


def train(job: Job, steps: int) -> Job:
    for _ in range(steps):
        job.ranks[0].count(LOAD)
    return job


def copied(folder: Path, node: LocalNode, last: int, **options) -> Job:
    """A job that has saved step 1 and copied one expert of a layer, in turn, at every step up to `last`."""
    job = counting(folder, nodes=[node], snapshot_experts=1, **options)
    job.load()
    train(job, 1).save(1)
    for step in range(2, last + 1):
        train(job, 1).copy(step)
    return job


def lost(job: Job) -> list[list[int]]:
    return list(job.ranks[0]._ledger.lost.values())


def hurt(folder: Path, label: str) -> None:
    for found in objects_of(folder, manifests(folder)[0], label):
        flip(found / "c.0", 0)


def rolled_back(folder: Path, node: LocalNode, label: str) -> Job:
    """Saves of steps 10 and 50, the newer one damaged, and a job that has gone on from what is good."""
    job = counting(folder)
    train(job, 10).save(10, full=True)
    train(job, 40).save(50, full=True)
    hurt(folder, label)
    job = counting(folder, nodes=[node])
    job.load()
    return job


@pytest.mark.parametrize("label", ["dense.", f"{BANKS[0]}.3."])
def test_after_a_recovery_from_memory_nothing_builds_on_a_damaged_checkpoint(tmp_path, label):
    node = LocalNode()
    job = rolled_back(tmp_path, node, label)
    step = 11 if label == "dense." else 51
    train(job, 1).copy(step)  # and is killed
    again = counting(tmp_path, nodes=[node])
    report, _ = again.load()
    assert report is not None
    assert (report.step, report.is_from_memory) == (step, True)
    assert train(again, 1).save(step + 1)[0].committed
    assert set(experts_by_step(manifests(tmp_path)[0]).values()) == {step + 1}  # full: there is nothing to take experts from
    _, whole = counting(tmp_path).load()
    assert_equal(whole, expected(step + 1))


def test_a_copy_is_built_on_what_its_own_start_committed(tmp_path):
    node = LocalNode()
    job = rolled_back(tmp_path, node, "dense.")
    train(job, 1).save(11, full=True)
    train(job, 1).copy(12)
    again = counting(tmp_path, nodes=[node])
    again.load()
    train(again, 1).save(13)
    newest = manifests(tmp_path)[0]
    assert not newest.full
    assert set(experts_by_step(newest).values()) == {11, 13}


def test_an_expert_never_comes_from_a_course_that_the_run_has_left(tmp_path):
    job = rolled_back(tmp_path, LocalNode(), "dense.")
    for step in (11, 12):
        train(job, 1).save(step)
    newest = manifests(tmp_path)[0]
    group = next(group for group, step in experts_by_step(newest).items() if step == 11)
    hurt(tmp_path, f"{group[0]}.{group[1]}.")
    again = counting(tmp_path)
    report, whole = again.load()  # the checkpoint of step 50 lies between them
    assert_equal(whole, expected(12, experts_by_step(newest) | {group: 10}))
    assert report is not None
    assert report.ages[group] == 2
    assert lost(again)[BANKS.index(group[0])][group[1]] == 20


def test_a_run_begun_anew_in_the_same_folder_takes_nothing_from_the_old_one(tmp_path):
    job = counting(tmp_path)
    for step in (100, 101, 102):
        train(job, 1).save(step)
    job = counting(tmp_path)
    job.load("never")
    for step in (1, 2):
        train(job, 1).save(step)
    newest = manifests(tmp_path)[0]
    group = next(group for group, step in experts_by_step(newest).items() if step == 1)
    hurt(tmp_path, f"{group[0]}.{group[1]}.")
    report, whole = counting(tmp_path).load()
    assert report is not None
    assert report.step == 102
    assert_equal(whole, expected(102, experts_by_step(manifests(tmp_path)[2])))


def test_what_a_rollback_left_behind_is_not_counted_among_those_that_are_kept(tmp_path):
    job = rolled_back(tmp_path, LocalNode(), "dense.")
    job.settings.keep = 2
    for step in range(11, 14):
        train(job, 1).save(step)
        steps = [point.step for point in manifests(tmp_path)]
        assert steps == {11: [11, 50, 10], 12: [12, 11], 13: [13, 12]}[step]


def test_a_copy_never_takes_an_older_expert_than_the_checkpoint_below_it(tmp_path, monkeypatch):
    node = LocalNode()
    job = copied(tmp_path, node, 7)
    train(job, 1).save(8)
    accord = job.ranks[0]._copying._accord
    known = accord.is_complete
    with monkeypatch.context() as patch:
        patch.setattr(accord, "is_complete", lambda save, patience: None if patience else known(save, patience))
        for step in (9, 10):  # copies that are not known to be everywhere in time, of checkpoints that are committed
            train(job, 1).save(step)
    train(job, 1).copy(11)
    on_disk = experts_by_step(manifests(tmp_path)[0])
    again = counting(tmp_path, nodes=[node], snapshot_experts=1)
    report, whole = again.load()
    assert report is not None
    assert (report.step, report.is_from_memory) == (11, True)
    steps = {group: 11 - age for group, age in report.ages.items()}
    assert all(steps[group] >= step for group, step in on_disk.items())
    assert_equal(whole, expected(11, steps))
    assert lost(again) == [[10 * report.ages[bank, expert] for expert in range(NUM_EXPERTS)] for bank in BANKS]


@pytest.mark.parametrize("mode", ["experts", "moments", "weights16"])
def test_the_ledger_of_a_copy_says_what_it_holds_when_a_part_of_an_older_one_is_gone(tmp_path, mode):
    node = LocalNode()
    copied(tmp_path, node, 10, mode=mode)
    flip(sorted((node.folder / "generations").glob("*.json"))[1], 50)
    node.start()
    again = counting(tmp_path, nodes=[node], snapshot_experts=1, mode=mode)
    report, _ = again.load()
    assert report is not None
    assert (report.step, report.is_from_memory, max(report.ages.values())) == (10, True, 9)
    assert lost(again) == [[10 * report.ages[bank, expert] for expert in range(NUM_EXPERTS)] for bank in BANKS]
    weights = [[10 * report.weight_ages[bank, expert] for expert in range(NUM_EXPERTS)] for bank in BANKS]
    assert list(again.ranks[0]._ledger.lost_weights.values()) == weights


def test_a_copy_that_cannot_be_made_smaller_is_kept_as_it_is(tmp_path, monkeypatch):
    node = LocalNode()
    job = copied(tmp_path, node, 9)
    before = {key: one.held.keys() for key, one in node.agent.generations.items()}
    whole = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.name.startswith(".") and path.with_name(path.name[1:]).exists():  # another description in the place of one
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return whole(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    train(job, 1).copy(10)
    assert all(node.agent.generations[key].held.keys() == held for key, held in before.items() if key in node.agent.generations)
    node.start()
    again = counting(tmp_path, nodes=[node], snapshot_experts=1)
    report, _ = again.load()
    assert report is not None
    assert (report.step, report.read.get("disk")) == (10, None)


def test_a_folder_that_is_away_is_no_folder_without_checkpoints(tmp_path):
    folder, away = tmp_path / "run" / "checkpoint", tmp_path / "away"
    counting(folder).save(100)
    job = counting(folder)
    folder.rename(away)
    with pytest.raises(CheckpointError, match="moved or unmounted"):
        job.load()
    away.rename(folder)
    report, whole = counting(folder).load()
    assert report is not None
    assert_equal(whole, expected(100))


def test_a_folder_that_goes_away_while_it_is_read_is_no_fresh_start(tmp_path, monkeypatch):
    folder = tmp_path / "run" / "checkpoint"
    counting(folder).save(100)
    job = counting(folder)
    read, calls = ArrayReader.read_checked, []

    def counted(*args):
        found = read(*args)
        calls.append(args)
        if len(calls) == 8:
            folder.rename(tmp_path / "away")
        return found

    monkeypatch.setattr(ArrayReader, "read_checked", counted)
    with pytest.raises(CheckpointError, match="went away while"):
        job.load()


def without_ancestors(folder: Path) -> None:
    """Manifests as they were before they named ancestors."""
    for path in (folder / "manifests").glob("*.json"):
        found = unseal(path.read_bytes(), str(path))
        del found["ancestors"]
        path.write_bytes(seal(json.dumps(found).encode()))


def test_manifests_that_name_no_ancestors_are_repaired_from_their_parents(tmp_path):
    for step in (1, 2, 3):
        job = counting(tmp_path)
        job.load()
        train(job, 1).save(step)
    newest = manifests(tmp_path)[0]
    group = next(group for group, step in experts_by_step(newest).items() if step == 3)
    hurt(tmp_path, f"{group[0]}.{group[1]}.")
    without_ancestors(tmp_path)
    report, whole = counting(tmp_path).load()
    assert report is not None
    assert_equal(whole, expected(3, experts_by_step(newest) | {group: experts_by_step(manifests(tmp_path)[1])[group]}))


def test_copies_of_an_agent_that_knew_no_ancestors_are_read(tmp_path, monkeypatch):
    node = LocalNode()
    job = counting(tmp_path, nodes=[node])
    job.load()
    train(job, 1).save(1)
    train(job, 1).copy(2)
    tell = SaveJob.to_json
    monkeypatch.setattr(SaveJob, "to_json", lambda job: {key: value for key, value in tell(job).items() if key not in ("ancestors", "run")})
    _, whole = counting(tmp_path, nodes=[node]).load()
    assert_equal(whole, expected(2))


def test_starts_that_each_begin_anew_do_not_fill_the_folder(tmp_path):
    for step in range(1, 8):
        job = counting(tmp_path, keep=2)
        job.load("never")
        train(job, 1).save(step)
    assert [point.step for point in manifests(tmp_path)] == [7, 6, 5]
    assert CheckpointFolder(tmp_path, Io()).sorted_out(2)[1] == []


def test_a_prune_looks_at_what_a_sweep_would_leave(tmp_path):
    job = rolled_back(tmp_path, LocalNode(), "dense.")
    train(job, 1).save(11, full=True)
    hurt(tmp_path, "dense.")
    damage = check_rest(CheckpointFolder(tmp_path, Io()), keep=2)  # that of step 10 stays, and is good
    assert len(damage) == 2
    with pytest.raises(CheckpointError, match="Nothing was removed"):
        check_rest(CheckpointFolder(tmp_path, Io()), keep=1)


class Late(FolderBackend):
    """A server that carries out the creation of one manifest after its client gave up: when that removes what was written, or then."""

    def __init__(self) -> None:
        super().__init__(Io())
        self.is_armed = self.is_blind = self.blinds = False  # `blinds`: the look after it fails too
        self.waiting: tuple[Path, bytes] | None = None
        tree = self.remove_tree

        def remove_tree(path: Path) -> None:
            tree(path)
            self.catch_up()

        self.remove_tree = remove_tree

        exists = self.exists

        def look(path: Path) -> bool:
            if self.is_blind:
                self.is_blind = False
                raise OSError(errno.EIO, "Input/output error", str(path))
            return exists(path)

        self.exists = look

    def create(self, path: Path, data: bytes) -> None:
        if self.is_armed and path.parent.name == "manifests":
            self.is_armed, self.is_blind, self.waiting = False, self.blinds, (path, data)
            raise NoAnswer(errno.ETIMEDOUT, "Connection timed out", str(path))
        super().create(path, data)

    def catch_up(self) -> None:
        if self.waiting:
            waiting, self.waiting = self.waiting, None
            super().create(*waiting)


@pytest.mark.parametrize("blinds", [False, True])
def test_a_manifest_that_appears_after_its_save_was_given_up_is_whole(tmp_path, monkeypatch, blinds):
    node, backend = LocalNode(), Late()
    backend.blinds = blinds
    monkeypatch.setattr(node.agent, "io", backend)
    job = Job(tmp_path, 1, 1, nodes=[node], experts_per_save=2, keep=1)
    job.save(1)
    backend.is_armed = True
    job.save(2)
    backend.catch_up()
    choice = agreed_choice(tmp_path, "must")  # which reads all of it
    assert choice is not None
    assert choice.manifest.step == 2
    job.save(3)
    newest = manifests(tmp_path)[0]
    assert newest.step == 3
    assert all((tmp_path / "objects" / name / "zarr.json").exists() for name in newest.objects)
    _, whole = Job(tmp_path, 1, 1).load()
    assert_equal(whole, expected(3, experts_by_step(newest)))
