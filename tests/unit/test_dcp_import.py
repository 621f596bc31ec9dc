"""DCP checkpoints read back: as recovery points that training goes on from, or refused in a sentence."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter

from moetrain.base.clock import SystemClock
from moetrain.base.errors import CheckpointError
from moetrain.checkpoint.checkpointer import Checkpointer
from moetrain.checkpoint.config import CheckpointConfig
from moetrain.checkpoint.dcp import METADATA, Facts, Tree, freshest, write_whole
from moetrain.checkpoint.dcp_import import DcpFolder, read_into
from moetrain.checkpoint.ledger import Ledger
from moetrain.checkpoint.recover import agreed_choice, alone, restore
from moetrain.dist.mesh import Mesh
from moetrain.dist.world import World
from moetrain.model.state import ModelState, assemble
from moetrain.optim.config import OptimConfig
from moetrain.parallel.config import EngineConfig, ParallelConfig
from moetrain.parallel.native import TorchEngine
from moetrain.store.io import Io
from moetrain.store.manifest import WEIGHT16, Manifest
from moetrain.store.objects import CheckpointFolder
from tests.unit.checkpoint_kit import BANKS, NUM_EXPERTS, Job, assert_equal, expected
from tests.unit.dcp_kit import Nested, load, nested_of, points, read_back, stacked, three_points, versions
from tools.bench_step import Case, model_config, random_batch, tiny

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return three_points(tmp_path)


@pytest.fixture
def folder(job: Job, tmp_path: Path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "checkpoint", Io())


class LowPrecision(Job):
    """Weights in bfloat16, moments in float32, counts as integers."""

    def states(self, version: int) -> list[ModelState]:
        return [
            [replace(part, data=part.data.bfloat16()) if part.component == "master" else part for part in state]
            for state in super().states(version)
        ]


def test_bfloat16_and_integers_go_both_ways(tmp_path: Path):
    job = LowPrecision(tmp_path / "checkpoint", 2, 2)
    for step in (10, 20):
        job.save(step)
    folder = CheckpointFolder(tmp_path / "checkpoint", Io())
    point = points(folder)[-1]
    whole = expected(20, versions(point))
    wanted = {key: values.bfloat16() if ":master" in key else values for key, values in whole.items()}
    assert {values.dtype for values in wanted.values()} == {torch.bfloat16, torch.float32, torch.int64}
    write_whole(folder, point, tmp_path / "out")
    assert_equal(load(tmp_path / "out", stacked(wanted)), stacked(wanted))
    read_back(tmp_path / "out", tmp_path / "fresh")
    report, found = LowPrecision(tmp_path / "fresh" / "checkpoint", 1, 1).load("must")
    assert report is not None and not report.remapped[1:]
    assert_equal(found, wanted)


def test_a_run_resumes_from_what_was_read_back(folder: CheckpointFolder, tmp_path: Path):
    tree = Tree(tmp_path / "tree")
    for point in points(folder):
        tree.add(folder, point)
    newest = points(folder)[-1]
    back = read_back(tree.folder_of(30), tmp_path / "fresh")
    assert (back.step, back.progress, back.ledger, back.index) == (30, newest.progress, newest.ledger, newest.index)
    assert back.ages() == newest.ages()
    assert back.adam_steps() == newest.adam_steps()
    resumed = Job(tmp_path / "fresh" / "checkpoint", 3, 3)
    report, found = resumed.load("must")
    assert report is not None and report.ages == newest.ages()
    assert_equal(found, expected(30, versions(newest)))
    resumed.save(40)
    assert not points(CheckpointFolder(tmp_path / "fresh" / "checkpoint", Io()))[-1].full


def test_training_goes_on_bit_by_bit_after_the_way_there_and_back(tmp_path: Path):
    model, world = tiny(model_config("gpt_125m_8e")), World.single(torch.device("cpu"))
    batches = [random_batch(model, Case(2, 16, 1), 0)]

    def engine() -> TorchEngine:
        made = TorchEngine(model, ParallelConfig(), EngineConfig(), OptimConfig(), world, Mesh(world, 1))
        made.initialize(0)
        return made

    trained, resumed = engine(), engine()
    for _ in range(3):
        trained.step(batches, 1e-2, lambda: None)
    checkpointer = Checkpointer(tmp_path / "run" / "checkpoint", CheckpointConfig(), 0, 1, alone, SystemClock())
    checkpointer.save(trained.state(), {"step": 3})
    checkpointer.finish()
    folder = CheckpointFolder(tmp_path / "run" / "checkpoint", Io())
    write_whole(folder, points(folder)[0], tmp_path / "dcp")
    read_back(tmp_path / "dcp", tmp_path / "fresh")
    choice = agreed_choice(tmp_path / "fresh" / "checkpoint", "must")
    assert choice is not None
    restore(choice, resumed.state(), 1)
    results = [one.step(batches, 1e-2, lambda: None).loss for one in (trained, resumed)]
    assert results[0] == results[1]
    assert_equal(assemble(resumed.state()), assemble(trained.state()))


def test_it_becomes_the_newest_recovery_point_of_a_folder_that_has_some(folder: CheckpointFolder, tmp_path: Path):
    write_whole(folder, points(folder)[0], tmp_path / "out")
    back = read_into(folder, DcpFolder(tmp_path / "out"), SystemClock())
    assert [point.step for point in points(folder)] == [10, 20, 30, 10]
    assert points(folder)[-1].save == back.save


def test_a_checkpoint_that_the_stock_writer_cut_otherwise_is_read_back(folder: CheckpointFolder, tmp_path: Path):
    point = points(folder)[-1]
    wanted = expected(30, versions(point))
    write_whole(folder, point, tmp_path / "out")
    nested: Nested = nested_of(load(tmp_path / "out", stacked(wanted)))
    said: dict = {"moetrain": ""}
    state_dict_loader.load(said, storage_reader=FileSystemReader(tmp_path / "out"), no_dist=True)
    state_dict_saver.save(nested | said, storage_writer=FileSystemWriter(tmp_path / "theirs"), no_dist=True)
    back = read_back(tmp_path / "theirs", tmp_path / "fresh")
    assert back.ages() == point.ages()
    _, found = Job(tmp_path / "fresh" / "checkpoint", 1, 1).load("must")
    assert_equal(found, wanted)


def test_what_is_no_recovery_point_is_refused_in_a_sentence(folder: CheckpointFolder, tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"no DCP checkpoint: it has no file \.metadata"):
        DcpFolder(tmp_path)
    state_dict_saver.save({"model": {"x": torch.ones(3)}}, storage_writer=FileSystemWriter(tmp_path / "other"), no_dist=True)
    with pytest.raises(CheckpointError, match="does not say how far training was"):
        read_back(tmp_path / "other", tmp_path / "fresh")
    assert not (tmp_path / "fresh").exists()
    (tmp_path / "other" / METADATA).write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="is damaged"):
        DcpFolder(tmp_path / "other")


FIRST_EXPERTS = f"model.{BANKS[0]}.down_proj"
LACKING = {
    "the optimizer": lambda key: key.startswith("optimizer."),
    "moments of something dense": lambda key: key == "optimizer.state.embedding.weight.exp_avg",
    "weights of experts": lambda key: key == FIRST_EXPERTS,
    "a component of experts": lambda key: BANKS[1] in key and key.endswith(".exp_avg_sq"),
}


def written_again(folder: CheckpointFolder, tmp_path: Path, facts: dict, lacks: Callable[[str], bool] = lambda key: False) -> Path:
    """The newest recovery point as another program might have saved it: without some tensors, and with other `facts`."""
    point = points(folder)[-1]
    write_whole(folder, point, tmp_path / "ours")
    flat = load(tmp_path / "ours", stacked(expected(30, versions(point))))
    kept = {key: value for key, value in flat.items() if not lacks(key)}
    said = {"moetrain": json.dumps(facts_of(point) | facts)}
    state_dict_saver.save(nested_of(kept) | said, storage_writer=FileSystemWriter(tmp_path / "theirs"), no_dist=True)
    return tmp_path / "theirs"


def facts_of(point: Manifest) -> dict:
    return json.loads(Facts.of(point).text())


@pytest.mark.parametrize("facts", [{}, {"keys": []}], ids=["ours", "of an older version"])
@pytest.mark.parametrize("lacks", LACKING.values(), ids=LACKING.keys())
def test_what_lacks_a_tensor_is_refused_before_the_folder_is_claimed(folder, tmp_path: Path, facts: dict, lacks: Callable[[str], bool]):
    path = written_again(folder, tmp_path, facts, lacks)
    with pytest.raises(CheckpointError, match="is not a whole recovery point: it lacks"):
        read_back(path, tmp_path / "fresh")
    assert not (tmp_path / "fresh").exists()


def test_facts_of_an_older_version_are_enough_for_what_is_whole(folder: CheckpointFolder, tmp_path: Path):
    newest = points(folder)[-1]
    read_back(written_again(folder, tmp_path, {"keys": []}), tmp_path / "fresh")
    report, found = Job(tmp_path / "fresh" / "checkpoint", 1, 1).load("must")
    assert report is not None and report.ages == newest.ages()
    assert_equal(found, expected(30, versions(newest)))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda facts: facts.update(mode="nonsense"), "its mode is nonsense, which is none of experts, weights16, moments, full"),
        (lambda facts: facts["steps"][BANKS[0]]["m"].pop(), "has 4 experts, and the steps of their m are"),
        (lambda facts: facts["steps"][BANKS[0]].pop("m"), "does not say of which step the experts in .* are"),
        (lambda facts: facts["steps"].pop(BANKS[0]), "is damaged: .*KeyError"),
        (lambda facts: facts.update(banks=None), "is damaged: .*AttributeError"),
        (lambda facts: facts.update(step="late"), "its steps are no numbers"),
        (lambda facts: facts.update(keys=[1]), "its names are no texts"),
        (lambda facts: facts.update(ledger=Ledger.of_banks({BANKS[0]: 3}).to_json()), "its ledger counts other experts"),
    ],
    ids=["mode", "short row", "no component", "no bank", "no banks", "step", "keys", "ledger"],
)
def test_facts_that_cannot_be_are_a_sentence_before_the_folder_is_claimed(folder, tmp_path: Path, change: Callable, sentence: str):
    facts = facts_of(points(folder)[-1])
    change(facts)
    with pytest.raises(CheckpointError, match=sentence):
        read_back(written_again(folder, tmp_path, facts), tmp_path / "fresh")
    assert not (tmp_path / "fresh").exists()


def test_an_unreadable_file_ends_the_reading_and_commits_nothing(folder: CheckpointFolder, tmp_path: Path):
    write_whole(folder, points(folder)[0], tmp_path / "out")
    victim = max((tmp_path / "out").glob(f"*{BANKS[1]}*"))
    victim.write_bytes(victim.read_bytes()[:40])
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_into(folder, DcpFolder(tmp_path / "out"), SystemClock())
    assert [point.step for point in points(folder)] == [10, 20, 30]


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(file.read_bytes()[:40])], ids=["gone", "cut"])
def test_a_damaged_tree_leaves_no_new_folder_and_is_told_with_the_name_of_the_file(folder, tmp_path: Path, damage: Callable):
    write_whole(folder, points(folder)[0], tmp_path / "out")
    victim = max((tmp_path / "out").glob(f"*{BANKS[1]}*"))
    damage(victim)
    with pytest.raises(CheckpointError, match="Write it again") as error:
        read_into(CheckpointFolder(tmp_path / "new" / "run" / "checkpoint", Io()), DcpFolder(tmp_path / "out"), SystemClock())
    assert "Error(" not in error.value.message
    assert str(victim) in error.value.message or victim.exists()
    assert not (tmp_path / "new").exists()


def test_a_newer_bfloat16_copy_stands_in_for_a_master(folder: CheckpointFolder, tmp_path: Path):
    """As `weights16` leaves them: the master of step 20, and a copy written with step 30."""
    point = points(folder)[-1]
    old = next(t for t in point.tensors.values() if t.component == "master" and t.group and point.objects[t.pieces[0].object].step < 30)
    new = next(t for t in point.tensors.values() if t.component == "master" and t.name == old.name and t.key != old.key
               and point.objects[t.pieces[0].object].step == 30)  # fmt: skip
    copy = replace(new, component=WEIGHT16, expert=old.expert)
    mixed = replace(point, tensors=point.tensors | {copy.key: copy})
    assert {t.key: t.pieces for t in freshest(mixed)}[old.key] == new.pieces
    older = replace(point, tensors=point.tensors | {(late := replace(old, component=WEIGHT16, expert=new.expert)).key: late})
    assert {t.key: t.pieces for t in freshest(older)}[new.key] == new.pieces
    assert len(freshest(mixed)) == len(point.tensors)
    assert max(t.expert or 0 for t in freshest(mixed)) == NUM_EXPERTS - 1
