"""Pins, pruning by hand, and sweeps that were interrupted or met a pin on the way."""

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from moetrain.base.errors import CheckpointError
from moetrain.store.io import Io
from moetrain.store.manifest import SaveId, seal
from moetrain.store.objects import CheckpointFolder, Superseded
from moetrain.store.owner import Owner
from tests.unit.crash_fs import CrashStates, MemoryFs, paths
from tests.unit.test_store_objects import committed, manifest, objects

ROOT = Path(__file__).parents[2]


class Killed(Exception):
    """Stands for a kill: nothing in the store catches it."""


@pytest.fixture
def folder(tmp_path) -> CheckpointFolder:
    folder = CheckpointFolder(tmp_path / "checkpoint", Io())
    folder.claim(0.0)
    return folder


def test_a_pinned_recovery_point_stays_until_it_is_unpinned(folder):
    names = [committed(folder, SaveId(1, seq)) for seq in (1, 2, 3, 4)]
    folder.pin("before-the-spike", SaveId(1, 2))
    folder.pin("before-the-spike", SaveId(1, 2))
    assert folder.pins() == {"before-the-spike": SaveId(1, 2)}
    folder.sweep(1, SaveId(1, 4))
    assert folder.saves() == [SaveId(1, 4), SaveId(1, 2)]
    assert objects(folder) == {names[3], names[1]}
    folder.unpin("before-the-spike")
    folder.sweep(1, SaveId(1, 4))
    assert folder.saves() == [SaveId(1, 4)]
    assert objects(folder) == {names[3]}


def test_a_pin_does_not_count_as_one_of_those_to_keep(folder):
    for seq in (1, 2, 3, 4):
        committed(folder, SaveId(1, seq))
    folder.pin("old", SaveId(1, 1))
    folder.sweep(2, SaveId(1, 4))
    assert [save.seq for save in folder.saves()] == [4, 3, 1]


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a@b", "x" * 101, "1"])
def test_names_that_are_no_file_names_are_refused(folder, name):
    committed(folder, SaveId(1, 1))
    with pytest.raises(CheckpointError, match="no name for a pin"):
        folder.pin(name, SaveId(1, 1))


def test_a_pin_needs_a_good_manifest_and_a_free_name(folder):
    for seq in (1, 2):
        committed(folder, SaveId(1, seq))
    with pytest.raises(CheckpointError):
        folder.pin("a", SaveId(1, 7))
    folder.pin("a", SaveId(1, 1))
    with pytest.raises(CheckpointError, match="keeps seq 1 already"):
        folder.pin("a", SaveId(1, 2))
    with pytest.raises(CheckpointError, match="no pin b"):
        folder.unpin("b")


@pytest.mark.parametrize("moment", range(60))
def test_a_pin_that_was_granted_in_the_middle_of_a_sweep_is_kept(folder, moment):
    names = {seq: committed(folder, SaveId(1, seq)) for seq in (1, 2, 3)}
    calls, granted = [], []

    def meanwhile(operation: str, path: Path) -> None:
        calls.append(operation)
        if len(calls) == moment:
            try:
                CheckpointFolder(folder.path, Io()).pin("mine", SaveId(1, 1))
            except CheckpointError:
                return
            granted.append(True)

    CheckpointFolder(folder.path, Io(meanwhile)).sweep(1, SaveId(1, 3))
    assert (SaveId(1, 1) in folder.saves()) == bool(granted)
    assert (names[1] in objects(folder)) == bool(granted)
    assert folder.pins() == ({"mine": SaveId(1, 1)} if granted else {})


@pytest.mark.parametrize("moment", range(1, 60))
def test_a_killed_sweep_is_completed_by_the_next(folder, moment):
    names = {seq: committed(folder, SaveId(1, seq)) for seq in (1, 2, 3, 4)}
    folder.pin("mine", SaveId(1, 2))
    left = [moment]

    def kill(operation: str, path: Path) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Killed

    try:
        CheckpointFolder(folder.path, Io(kill)).sweep(1, SaveId(1, 4))
    except Killed:
        assert {names[2], names[4]} <= objects(folder)
    folder.sweep(1, SaveId(1, 4))
    assert [save.seq for save in folder.saves()] == [4, 2]
    assert objects(folder) == {names[2], names[4]}
    assert list((folder.path / "gc").iterdir()) == []


def test_a_damaged_journal_is_done_without(folder):
    for seq in (1, 2):
        committed(folder, SaveId(1, seq))
    (folder.path / "gc").mkdir()
    (folder.path / "gc" / f"{SaveId(1, 1)}.objects.json").write_bytes(b"rubbish")
    folder.sweep(1, SaveId(1, 2))
    assert folder.saves() == [SaveId(1, 2)]
    assert list((folder.path / "gc").iterdir()) == []


def test_prune_by_hand_takes_a_folder_over_that_no_job_uses(folder):
    names = [committed(folder, SaveId(1, seq)) for seq in (1, 2, 3)]
    folder.prune(1)
    assert folder.saves() == [SaveId(1, 3)]
    assert objects(folder) == {names[2]}
    with pytest.raises(Superseded):
        committed(folder, SaveId(1, 4))


@pytest.mark.parametrize(("host", "pid"), [(os.uname().nodename, 1), ("elsewhere", os.getpid())], ids=["here", "elsewhere"])
def test_prune_leaves_the_folder_of_a_job_that_may_be_alive(folder, host, pid):
    for seq in (1, 2):
        committed(folder, SaveId(1, seq))
    owner = json.dumps({"host": host, "pid": pid, "time": 0.0}).encode()
    (folder.path / "claims" / "000002").write_bytes(seal(owner))
    with pytest.raises(CheckpointError, match=f"Process {pid} on {host}"):
        folder.prune(1)
    assert len(folder.saves()) == 2
    folder.prune(1, take_over=True)
    assert len(folder.saves()) == 1


def claimed_by(folder: CheckpointFolder, owner: dict) -> None:
    for seq in (1, 2):
        committed(folder, SaveId(1, seq))
    (folder.path / "claims" / "000002").write_bytes(seal(json.dumps(owner).encode()))


def claim_of_an_ended_process() -> dict:
    program = "import json; from moetrain.store.owner import Owner; print(json.dumps(Owner.of_this_process(0.0).to_json()))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "change",
    [{"boot": "another"}, {"namespace": "pid:[1]"}, {"started": ""}, {"namespace": ""}],
    ids=["another boot", "another container", "start not read", "namespace not read"],
)
def test_a_job_that_cannot_be_seen_from_here_is_not_taken_for_ended(folder, change):
    claimed_by(folder, claim_of_an_ended_process() | change)
    with pytest.raises(CheckpointError, match="may be writing to"):
        folder.prune(1)


def test_a_claim_of_an_older_version_tells_too_little_to_know_that_its_job_has_ended(folder):
    claimed_by(folder, {name: value for name, value in claim_of_an_ended_process().items() if name in ("host", "pid", "time", "token")})
    with pytest.raises(CheckpointError, match=r"Process \d+ on .* may be writing to"):
        folder.prune(1)


def test_prune_takes_the_folder_of_a_process_that_ended_here(folder):
    claimed_by(folder, claim_of_an_ended_process())
    folder.prune(1)
    assert len(folder.saves()) == 1


@pytest.mark.parametrize(("started", "is_alive"), [(None, True), ("1", False)], ids=["the same process", "a later one of that number"])
def test_a_process_is_known_by_its_start_and_not_by_its_number(folder, started, is_alive):
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as running:
        stat = Path(f"/proc/{running.pid}/stat").read_text()
        claimed_by(folder, Owner.of_this_process(0.0).to_json() | {"pid": running.pid, "started": started or stat.split()[21]})
        if is_alive:
            with pytest.raises(CheckpointError, match=f"Process {running.pid}"):
                folder.prune(1)
        else:
            folder.prune(1)


def test_a_coordinator_that_slept_during_a_sweep_removes_no_object_of_its_successor(folder):
    names = {committed(folder, SaveId(1, seq)) for seq in (1, 2)}

    def another_job(operation: str, path: Path) -> None:
        if operation == "fsync_folder" and path.name == "manifests":
            CheckpointFolder(folder.path, Io()).claim(0.0)

    with pytest.raises(Superseded):
        CheckpointFolder(folder.path, Io(another_job)).sweep(1, SaveId(1, 2))
    assert objects(folder) == names


def test_an_interrupted_save_is_known(folder):
    committed(folder, SaveId(1, 1))
    folder.put_receipt(SaveId(1, 2), 0, {})
    folder.put_receipt(SaveId(1, 3), 0, {})
    folder.abandon(SaveId(1, 3), "a reason")
    assert folder.unfinished() == [SaveId(1, 2)]


def test_a_pin_that_was_refused_does_not_come_back_after_a_power_failure():
    fs, root = MemoryFs(), Path("/run")
    folder = CheckpointFolder(root, fs)
    folder.claim(0.0)
    share = folder.new_share(SaveId(1, 1), 0)
    folder.commit(manifest(SaveId(1, 1), [f"{share}/dense.float32"]))
    fs.mkdir(root / "gc")
    fs.write_new(root / "gc" / f"{SaveId(1, 2)}.manifests.json", [seal(json.dumps({"manifests": [str(SaveId(1, 1))]}).encode())])
    with pytest.raises(CheckpointError, match="just being removed"):
        folder.pin("mine", SaveId(1, 1))
    states = CrashStates(fs)
    left = [paths(states.state(len(fs.events), Random(seed))) for seed in range(50)]
    assert not any("/pins/mine" in path for state in left for path in state)


def test_a_sweep_reads_every_manifest_once(tmp_path):
    reads = list[Path]()
    folder = CheckpointFolder(tmp_path, Io(lambda operation, path: reads.append(path) if operation == "read" else None))
    folder.claim(0.0)
    for seq in (1, 2, 3, 4):
        committed(folder, SaveId(1, seq))
    reads.clear()
    folder.sweep(2, SaveId(1, 4))
    assert [path for path in reads if path.parent.name == "manifests"] == [
        tmp_path / "manifests" / f"000001-0000000{seq}.json" for seq in (4, 3, 2, 1)
    ]


def test_a_manifest_that_somebody_removes_during_a_sweep_costs_no_object(tmp_path):
    def remove(operation: str, path: Path) -> None:
        if operation == "read" and path.name == "000001-00000003.json":
            path.unlink(missing_ok=True)

    quiet = CheckpointFolder(tmp_path, Io())
    quiet.claim(0.0)
    names = [committed(quiet, SaveId(1, seq)) for seq in (1, 2, 3, 4)]
    folder = CheckpointFolder(tmp_path, Io(remove))
    folder.sweep(2, SaveId(1, 4))
    assert folder.saves() == [SaveId(1, 4), SaveId(1, 2)]
    assert objects(folder) == {names[3], names[1]}
