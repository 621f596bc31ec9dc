"""The part of the crash campaign that fits into every test run, and that the campaign itself would notice a mistake."""

import json
from pathlib import Path
from random import Random

import pytest

from moetrain.store import encode
from moetrain.store.backend import FolderBackend
from moetrain.store.encode import ArrayReader
from moetrain.store.pins import Pins
from moetrain.store.sweep import Sweep
from tests.unit import crash_damage, crash_states, crash_sweeps
from tests.unit.crash_fs import CrashStates, MemoryFs, paths
from tools.crash_campaign import main

pytestmark = pytest.mark.chaos
FILE = Path("/a/b")


def test_no_power_failure_during_a_save_or_a_sweep_loses_a_checkpoint():
    tally = crash_states.simulate(600, 1, crash_states.Tally())
    assert tally.failures == []
    assert min(tally.recovered.values()) > 50
    assert tally.went_on > 5


def test_all_damage_is_noticed_and_recovery_comes_to_the_right_versions(monkeypatch):
    monkeypatch.setattr(encode, "CHUNK_BYTES", 4096)
    found = crash_damage.simulate(210, 2)
    assert found.failures == []
    assert found.injected == found.noticed == found.right
    assert len(found.injected) == len(crash_damage.KINDS) * len(crash_damage.PLACES)


def test_no_schedule_of_saves_pins_prunes_and_crashes_removes_what_is_alive():
    tally = crash_sweeps.simulate(250, 3, crash_sweeps.Tally())
    assert tally.failures == []
    assert min(tally.crashes["kill"], tally.crashes["power"]) > 50


def test_a_killed_rank_or_two_never_cost_a_checkpoint(tmp_path, capsys):
    assert main(["--parts", "pairs", "--scale", "0.05", "--json", str(tmp_path / "a.json")]) == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert (found["pairs"]["lost_or_wrong"], found["pairs"]["failures"]) == (0, [])
    assert found["pairs"]["kills"] == 16
    assert capsys.readouterr().out


# would it notice?


def test_a_manifest_whose_name_is_not_synced_is_noticed(monkeypatch):
    def create(self: FolderBackend, path: Path, data: bytes) -> None:
        if not self.io.is_folder(path.parent):
            self.io.mkdir(path.parent)
        self.io.write_new(path, [data])

    monkeypatch.setattr(FolderBackend, "create", create)
    assert crash_states.simulate(300, 1, crash_states.Tally()).failures


def test_a_manifest_that_is_written_in_place_is_noticed_by_kills(monkeypatch, tmp_path):
    def create(self: FolderBackend, path: Path, data: bytes) -> None:
        if not self.io.is_folder(path.parent):
            self.io.mkdir(path.parent)
        self.io.write_new(path, [data[:100]])
        self.io.fsync_folder(path.parent)  # where a kill may come between
        self.io.unlink(path)
        self.io.write_new(path, [data])

    monkeypatch.setattr(FolderBackend, "create", create)
    assert main(["--parts", "kills", "--scale", "0.001", "--json", str(tmp_path / "a.json")]) == 1
    assert json.loads((tmp_path / "a.json").read_text())["kills"]["lost_or_wrong"] > 0


def test_a_share_whose_folder_is_not_synced_is_noticed(monkeypatch):
    real = MemoryFs.fsync_folder
    monkeypatch.setattr(MemoryFs, "fsync_folder", lambda self, path: None if ".part" in str(path) else real(self, path))
    assert crash_states.simulate(300, 1, crash_states.Tally()).failures


def test_a_sweep_that_does_not_wait_for_its_manifests_to_go_is_noticed(monkeypatch):
    monkeypatch.setattr(MemoryFs, "fsync_folder", lambda self, path: None)
    assert crash_states.simulate(300, 1, crash_states.Tally()).failures


def test_a_sweep_that_forgets_pins_is_noticed(monkeypatch):
    monkeypatch.setattr(Pins, "kept", lambda self: set())
    assert crash_sweeps.simulate(100, 1, crash_sweeps.Tally()).failures


def test_a_sweep_that_takes_only_the_newest_for_alive_is_noticed(monkeypatch):
    real = Sweep._live
    monkeypatch.setattr(Sweep, "_live", lambda self: set(list(real(self) or [])[:1]))
    assert crash_sweeps.simulate(100, 1, crash_sweeps.Tally()).failures


def test_a_reader_without_checksums_is_noticed(monkeypatch):
    monkeypatch.setattr(encode, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(encode, "checksum", lambda data: b"\0\0\0\0")
    monkeypatch.setattr(ArrayReader, "_check_index", lambda self: None)
    assert crash_damage.simulate(70, 1).failures


def test_the_simulated_disk_forgets_what_was_not_synced_and_nothing_else():
    full = b"x" * 5000
    fs = MemoryFs({"a": {}})
    fs.write_new(FILE, [full])
    fs.fsync_folder(FILE.parent)
    fs.unlink(FILE)
    states = CrashStates(fs)

    def possible(moment: int) -> set[bytes | None]:
        return {paths(states.state(moment, Random(seed))).get(str(FILE)) for seed in range(200)}

    created, written, synced, named, removed = range(1, 6)
    assert possible(created) == {None, b""}
    assert {None, b"", full, bytes(4096) + full[4096:], full[:4096] + bytes(904)} < possible(written)
    assert possible(synced) == possible(removed) == {None, full}
    assert possible(named) == {full}
