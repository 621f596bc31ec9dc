"""Recovery points as DCP checkpoints that its stock reader loads."""

import json
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from moetrain.base.errors import CheckpointError
from moetrain.checkpoint.dcp import METADATA, Tree, write_whole
from moetrain.store.io import Io
from moetrain.store.objects import CheckpointFolder
from tests.unit.checkpoint_kit import Job, assert_equal, expected
from tests.unit.dcp_kit import load, nested_of, points, read_back, stacked, three_points, versions

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return three_points(tmp_path)


@pytest.fixture
def folder(job: Job, tmp_path: Path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "checkpoint", Io())


def num_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.distcp"))


def test_stock_reader_loads_a_recovery_point(folder: CheckpointFolder, tmp_path: Path):
    point = points(folder)[-1]
    wanted = stacked(expected(30, versions(point)))
    write_whole(folder, point, tmp_path / "out")
    assert_equal(load(tmp_path / "out", wanted), wanted)
    said = {"moetrain": ""}
    state_dict_loader.load(said, storage_reader=FileSystemReader(tmp_path / "out"), no_dist=True)
    assert json.loads(said["moetrain"])["progress"] == point.progress
    with pytest.raises(CheckpointError, match="exists"):
        write_whole(folder, point, tmp_path / "out")


def test_stock_converter_makes_a_nested_torch_file(folder: CheckpointFolder, tmp_path: Path):
    write_whole(folder, points(folder)[0], tmp_path / "out")
    dcp_to_torch_save(tmp_path / "out", tmp_path / "all.pt")
    found = torch.load(tmp_path / "all.pt", weights_only=True)
    assert found.pop("moetrain")
    wanted = nested_of(stacked(expected(10)))
    assert found.keys() == wanted.keys()
    assert_equal(found["model"], wanted["model"])
    for name, state in wanted["optimizer"]["state"].items():
        assert_equal(found["optimizer"]["state"][name], state)


def test_every_folder_of_a_tree_is_a_checkpoint_and_holds_what_its_save_wrote(folder: CheckpointFolder, tmp_path: Path):
    tree = Tree(tmp_path / "tree")
    for point in points(folder):
        tree.add(folder, point)
    for point in points(folder):
        wanted = stacked(expected(point.step, versions(point)))
        assert_equal(load(tree.folder_of(point.step), wanted), wanted)
    first, *later = [num_bytes(tree.folder_of(step)) for step in (10, 20, 30)]
    assert all(size < 0.6 * first for size in later)
    assert not [name for name in tree.folder_of(30).iterdir() if "000001-00000001" in name.name]


def test_publishing_again_writes_only_what_is_new(job: Job, folder: CheckpointFolder, tmp_path: Path):
    tree = Tree(tmp_path / "tree")
    for point in points(folder):
        tree.add(folder, point)
    before = {file: file.stat().st_ino for file in tree.path.rglob("*") if file.is_file()}
    job.save(40)
    newest = points(folder)[-1]
    assert tree.has(points(folder)[0]) and not tree.has(newest)
    tree.add(folder, newest)
    assert {file: file.stat().st_ino for file in before} == before
    new = {file.parent.name for file in tree.path.rglob("*") if file.is_file()} - {file.parent.name for file in before}
    assert new == {"step-40"}
    wanted = stacked(expected(40, versions(newest)))
    assert_equal(load(tree.folder_of(40), wanted), wanted)


def test_what_older_saves_wrote_is_published_although_their_recovery_points_are_gone(tmp_path: Path):
    job = Job(tmp_path / "checkpoint", 1, 1, keep=1)
    for step in (10, 20, 30):
        job.save(step)
    folder = CheckpointFolder(tmp_path / "checkpoint", Io())
    (point,) = points(folder)
    tree = Tree(tmp_path / "tree")
    tree.add(folder, point)
    wanted = stacked(expected(30, versions(point)))
    assert_equal(load(tree.folder_of(30), wanted), wanted)
    assert not (tree.folder_of(10) / METADATA).exists()
    assert list(tree.folder_of(10).glob("*.distcp"))


def test_a_tree_can_be_moved(folder: CheckpointFolder, tmp_path: Path):
    tree = Tree(tmp_path / "tree")
    for point in points(folder):
        tree.add(folder, point)
    moved = tree.path.rename(tmp_path / "elsewhere")
    wanted = stacked(expected(30, versions(points(folder)[-1])))
    assert_equal(load(moved / "step-30", wanted), wanted)


class Crash(Exception):
    pass


def test_a_crash_anywhere_leaves_the_checkpoints_that_were_there(folder: CheckpointFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tree, (first, second, _) = Tree(tmp_path / "tree"), points(folder)
    tree.add(folder, first)
    wanted = {point.step: stacked(expected(point.step, versions(point))) for point in (first, second)}
    rename, crashes = Path.rename, 0
    while not tree.has(second):
        calls = 0

        def sometimes(path: Path, target: Path, crashes: int = crashes) -> Path:
            nonlocal calls
            calls += 1
            if calls > crashes:
                raise Crash
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", sometimes)
        try:
            tree.add(folder, second)
        except Crash:
            crashes += 1
            assert not (tree.folder_of(20) / METADATA).exists()
        monkeypatch.setattr(Path, "rename", rename)
        assert_equal(load(tree.folder_of(10), wanted[10]), wanted[10])
    assert crashes > 3
    assert_equal(load(tree.folder_of(20), wanted[20]), wanted[20])


def test_the_newer_of_two_recovery_points_of_one_step_stands(folder: CheckpointFolder, tmp_path: Path):
    tree = Tree(tmp_path / "tree")
    for point in points(folder):
        tree.add(folder, point)
    again = Job(tmp_path / "checkpoint", 1, 1, keep=10)
    again.save(20)
    newest = points(folder)[-1]
    assert not tree.has(newest)
    tree.add(folder, newest)
    assert tree.has(newest)
    for step, at in ((20, 20), (30, 30)):
        point = newest if step == 20 else points(folder)[2]
        wanted = stacked(expected(at, versions(point)))
        assert_equal(load(tree.folder_of(step), wanted), wanted)


def test_damage_is_found_before_anything_is_published(folder: CheckpointFolder, tmp_path: Path):
    point = points(folder)[-1]
    name = next(name for name, record in point.objects.items() if record.step == 30)
    file = folder.path / "objects" / name / "c.0"
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        write_whole(folder, point, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match="damaged"):
        Tree(tmp_path / "tree").add(folder, point)
    assert not (tmp_path / "tree" / "step-30" / METADATA).exists()


def test_weights16_shows_the_newest_weights_with_older_moments(tmp_path: Path):
    job = Job(tmp_path / "checkpoint", 2, 2, mode="weights16")
    for step in (10, 20, 30):
        job.save(step)
    folder = CheckpointFolder(tmp_path / "checkpoint", Io())
    point = points(folder)[-1]
    stale = {group for group, age in point.ages().items() if age}
    wanted = expected(30, versions(point))
    for key, newest in expected(30).items():
        name, component, *expert = key.split(":")
        if component == "master" and expert and (name.rpartition(".")[0], int(expert[0])) in stale:
            wanted[key] = newest.bfloat16().float()
    assert len(stale) > 2 and not any(point.weight_ages().values())
    tree = Tree(tmp_path / "tree")
    for one in points(folder):
        tree.add(folder, one)
    assert_equal(load(tree.folder_of(30), stacked(wanted)), stacked(wanted))
    back = read_back(tree.folder_of(30), tmp_path / "fresh")
    assert (back.ages(), back.weight_ages()) == (point.ages(), point.weight_ages())
    _, found = Job(tmp_path / "fresh" / "checkpoint", 1, 1, mode="weights16").load("must")
    assert_equal(found, wanted)
