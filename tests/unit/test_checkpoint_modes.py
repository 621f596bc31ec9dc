"""What each mode writes, and what a recovery gives back of it: masters, bfloat16 weights, moments and steps of every expert."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moetrain.checkpoint.choose import Choice, choose
from moetrain.checkpoint.config import CheckpointConfig
from moetrain.checkpoint.copying import parts_of, shown
from moetrain.checkpoint.modes import MODES
from moetrain.checkpoint.plan import Holding, Part, Writes, holdings_of, merged, my_parts, writes
from moetrain.checkpoint.turns import Horizon, Turns, homes_of
from moetrain.store.io import Io
from moetrain.store.manifest import WEIGHT16, Manifest, Piece, Tensor
from moetrain.store.objects import CheckpointFolder
from tests.unit.checkpoint_kit import BANKS, EXPERT, NUM_EXPERTS, Job, assert_equal, expected, logical, state_of
from tests.unit.rotation import rotation

LAYOUTS = [(1, 1, False), (2, 2, False), (2, 2, True), (4, 2, False), (3, 3, True)]


def newest(folder: Path) -> Manifest:
    choice = choose(folder, Io())
    assert isinstance(choice, Choice)
    assert not choice.damage
    return choice.manifest


def written_at(manifest: Manifest) -> dict[tuple[str, int], int]:
    """Version of the state of every expert that rotates."""
    return {group: manifest.step - age for group, age in manifest.ages().items()}


def restored(manifest: Manifest, fresh: str) -> dict[str, torch.Tensor]:
    """What a recovery must give. `fresh`: which weights are of the newest step: all | bfloat16 | none."""
    values = expected(manifest.step, written_at(manifest))
    for key, old in values.items():
        name, component, *expert = key.split(":")
        if not expert or component != "master" or fresh == "none":
            continue
        value = logical(key, component, tuple(old.shape), manifest.step)
        is_stale = written_at(manifest)[name.rpartition(".")[0], int(expert[0])] < manifest.step
        values[key] = value.bfloat16().float() if fresh == "bfloat16" and is_stale else value
    return values


@pytest.mark.parametrize(("world", "ep", "sharded"), LAYOUTS)
@pytest.mark.parametrize(("mode", "fresh"), [("experts", "none"), ("moments", "all"), ("weights16", "bfloat16"), ("full", "all")])
def test_a_recovery_gives_what_the_mode_promises(tmp_path, world, ep, sharded, mode, fresh):
    job = Job(tmp_path, world, ep, sharded, mode=mode)
    job.load("never")
    for version in (1, 2, 3):
        assert all(pending.committed for pending in job.save(version))
    manifest = newest(tmp_path)
    stale = [group for group, age in manifest.ages().items() if age]
    assert len(stale) == (0 if mode == "full" else len(BANKS) * (NUM_EXPERTS - 1))
    _, found = Job(tmp_path, 1, 1, mode=mode).load()
    assert_equal(found, restored(manifest, fresh))
    assert max(manifest.weight_ages().values()) == (2 if mode == "experts" else 0)


def test_bfloat16_is_never_written_beside_its_master(tmp_path):
    job = Job(tmp_path, 2, 2, mode="weights16")
    for version in (1, 2, 3):
        job.save(version)
        manifest = newest(tmp_path)
        for tensor in manifest.tensors.values():
            if tensor.component == WEIGHT16:
                master = manifest.tensors[tensor.key.replace(WEIGHT16, "master")]
                assert manifest.step_of(master) < manifest.step_of(tensor) == manifest.step
                assert tensor.dtype == "bfloat16"
    assert any(tensor.component == WEIGHT16 for tensor in manifest.tensors.values())
    assert not any(tensor.component == WEIGHT16 for tensor in full_manifest(tmp_path).tensors.values())


def full_manifest(folder: Path) -> Manifest:
    points = [point for point in CheckpointFolder(folder, Io()).history() if isinstance(point, Manifest)]
    return points[-1]


def test_a_run_that_leaves_the_mode_keeps_the_fresh_weights(tmp_path):
    Job(tmp_path, 1, 1, mode="weights16").save(1)
    job = Job(tmp_path, 1, 1, mode="weights16", keep=9)
    job.load()
    job.save(2)
    other = Job(tmp_path, 1, 1, mode="experts", keep=9)
    other.load()
    other.save(3)
    manifest = newest(tmp_path)
    assert sorted(set(manifest.weight_ages().values())) == [0, 1]
    _, found = Job(tmp_path, 1, 1).load()
    for (bank, expert), age in manifest.weight_ages().items():
        for name, shape in EXPERT.items():
            key = f"{bank}.{name}:master:{expert}"
            value = logical(key, "master", shape, 3 - age)
            exact = written_at(manifest)[bank, expert] == 3 - age
            assert torch.equal(found[key], value if exact else value.bfloat16().float())


def test_an_expert_whose_bfloat16_copy_is_damaged_comes_from_an_older_recovery_point(tmp_path):
    job = Job(tmp_path, 1, 1, mode="weights16", keep=9)
    for version in (1, 2, 3):
        job.save(version)
    manifest = newest(tmp_path)
    (copy, *_) = (tensor for tensor in manifest.tensors.values() if tensor.component == WEIGHT16)
    assert copy.group
    file = tmp_path / "objects" / copy.pieces[0].object / "c.0"
    data = bytearray(file.read_bytes())
    data[3] ^= 1
    file.write_bytes(data)
    choice = choose(tmp_path, Io())
    assert choice is not None
    assert choice.manifest.step == 3
    assert choice.manifest.weight_ages()[copy.group] == 1
    assert any(f"Expert {copy.group[1]} of {copy.group[0]} is taken from" in line for line in choice.damage)


def test_recoveries_are_booked_in_the_ledger_of_the_next_manifest(tmp_path):
    banks: dict[str, int] = {bank: NUM_EXPERTS for bank in BANKS}
    load = [[4, 3, 2, 1], [1, 1, 1, 1]]

    def counting() -> Job:
        job = Job(tmp_path, 2, 2, turns=Turns(CheckpointConfig(), Horizon(banks, 100)))
        job.load()
        return job

    job = counting()
    for version in (1, 2, 3):
        for rank in job.ranks:
            rank.count(load)
        assert all(pending.committed for pending in job.save(version))
    manifest = newest(tmp_path)
    steps = {group: manifest.step - age for group, age in manifest.ages().items()}
    lost = {bank: [(3 - steps[bank, e]) * row[e] for e in range(NUM_EXPERTS)] for bank, row in zip(BANKS, load, strict=True)}
    assert job.ranks[0].status().figures.if_fault == pytest.approx(sum(map(sum, lost.values())) / 200)
    again = counting()
    assert again.ranks[1].status().figures.moments == pytest.approx(sum(map(sum, lost.values())) / 200)
    for rank in again.ranks:
        rank.count(load)
    assert all(pending.committed for pending in again.save(4))
    ledger = newest(tmp_path).ledger
    assert ledger["lost"] == ledger["lost_weights"] == lost
    assert ledger["total"] == {bank: [4 * x for x in row] for bank, row in zip(BANKS, load, strict=True)}


# division over ranks


def share_bytes(world: int, ep: int, mode: str, selection, sharded: bool = False) -> tuple[list[int], Writes]:
    """What every rank of the small state writes, and what the plan says."""
    held = [parts_of(shown(state_of(rank, world, ep, 1, sharded), mode)) for rank in range(world)]
    known = merged(holdings_of(parts) for parts in held)
    shares = [my_parts(parts, rank, mode, selection, known) for rank, parts in enumerate(held)]
    return [sum(part.num_bytes for part in share) for share in shares], writes(known, mode, selection)


@given(mode=st.sampled_from(MODES), index=st.integers(0, 8), layout=st.sampled_from([*LAYOUTS, (8, 4, False), (8, 4, True)]))
def test_the_plan_says_what_ranks_write(mode, index, layout):
    world, ep, sharded = layout
    selection = rotation(index, dict.fromkeys(BANKS, NUM_EXPERTS), 1)
    loads, plan = share_bytes(world, ep, mode, selection, sharded)
    assert abs(sum(loads) - sum(plan.loads.values())) <= world  # quotas are whole bytes
    assert all(abs(load - plan.loads[rank]) <= 8192 for rank, load in enumerate(loads))  # no tensor is cut finer


class Shape:
    """A model by its sizes in bytes: `dense` tensors and `layers` banks of experts over `world` ranks, experts on `ep` of them in turn."""

    def __init__(
        self, world: int, ep: int, layers: int, num_experts: int, expert: int, dense: list[int], is_replicated: bool = True
    ) -> None:
        self.world, self.layers, self.num_experts = world, layers, num_experts
        self.banks = {f"blocks.{i}.moe.experts": num_experts for i in range(layers)}
        self.parts = [self._parts(rank, ep, expert, dense, is_replicated) for rank in range(world)]
        self.holdings: list[Holding] = merged(holdings_of(parts) for parts in self.parts)

    def _parts(self, rank: int, ep: int, expert: int, dense: list[int], is_replicated: bool) -> list[Part]:
        parts = []
        for i, size in enumerate(dense):
            rows = size // 64
            start, stop = (0, rows) if is_replicated else (rank * rows // self.world, (rank + 1) * rows // self.world)
            holders = tuple(range(self.world)) if is_replicated else (rank,)
            parts.append(_part(f"w{i}", None, (rows, 16), start, stop, holders, len(parts)))
        holders = tuple(other for other in range(self.world) if other % ep == rank % ep)
        for bank in self.banks:
            for e in range(self.num_experts):
                if e * ep // self.num_experts == rank % ep:
                    parts.append(_part(f"{bank}.up", (bank, e), (expert // 64, 16), 0, expert // 64, holders, len(parts)))
        return parts

    def loads(self, selection) -> list[int]:
        shares = (my_parts(parts, rank, "experts", selection, self.holdings) for rank, parts in enumerate(self.parts))
        return [sum(part.num_bytes for part in share) for share in shares]


def _part(name, group, shape, start, stop, holders, number) -> Part:
    bank, expert = group or (None, None)
    piece = Piece((start, 0), (stop - start, shape[1]), "")
    return Part(Tensor(name, "master", bank, expert, "float32", shape, (piece,)), holders, number)


@pytest.mark.parametrize(("world", "ep", "layers", "k"), [(8, 8, 12, 1), (8, 8, 3, 1), (8, 4, 5, 3), (6, 3, 7, 2), (4, 4, 2, 5)])
def test_every_checkpoint_of_a_rotation_is_balanced_where_dense_state_is_replicated(world, ep, layers, k):
    """K x layers is no multiple of the ranks: what all hold fills the gaps, one large tensor included."""
    shape = Shape(world, ep, layers, 16 if ep != 3 else 15, 1 << 17, [3 << 20, 5 << 18, 77 << 12, 4096] * layers)
    for index in range(20):
        loads = shape.loads(rotation(index, shape.banks, k))
        assert max(loads) / (sum(loads) / world) <= 1.05


@pytest.mark.parametrize("is_replicated", [True, False])
@given(layers=st.integers(1, 6), k=st.integers(1, 4), index=st.integers(0, 30), layout=st.sampled_from([(4, 4), (4, 2), (6, 3), (5, 1)]))
def test_no_rank_writes_more_than_the_shards_force(is_replicated, layers, k, index, layout):
    world, ep = layout
    shape = Shape(world, ep, layers, 12, 1 << 16, [1 << 20, 3 << 16], is_replicated)
    selection = rotation(index, shape.banks, k)
    plan = writes(shape.holdings, "experts", selection)
    assert max(shape.loads(selection)) <= 1.02 * plan.bound + 8192
    assert plan.bound >= sum(plan.loads.values()) / world - world  # quotas are whole bytes


def test_large_experts_are_divided_before_small_ones():
    sizes = {("a", 0): 100, ("a", 1): 100, ("a", 2): 100, ("b", 0): 300}
    plan = writes([Holding(group, "m", (0, 1), size) for group, size in sizes.items()], "full", None)
    assert plan.loads == {0: 300, 1: 300}
    assert plan.imbalance == 1.0


def test_homes_are_where_experts_live():
    homes = homes_of(Shape(4, 2, 1, 4, 1 << 16, [1 << 18]).holdings)
    assert homes.of == {("blocks.0.moe.experts", e): (0, 2) if e < 2 else (1, 3) for e in range(4)}
    assert homes.spread == pytest.approx(4.0)
