"""Who writes what, whose turn it is, which boxes meet: invariants of the pure parts."""

from collections import Counter
from itertools import pairwise, product
from math import ceil, prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetrain.base.errors import CheckpointError, ConfigError
from moetrain.checkpoint.config import CheckpointConfig
from moetrain.checkpoint.copying import parts_of
from moetrain.checkpoint.job import Receipt, SaveJob
from moetrain.checkpoint.merge import merge
from moetrain.checkpoint.modes import is_written
from moetrain.checkpoint.plan import Part, holdings_of, lay_out, merged, my_parts
from moetrain.store.boxes import overlap, tiles
from moetrain.store.manifest import Manifest, ObjectRecord, Piece, SaveId, Tensor, natural, seal, unseal
from tests.unit.checkpoint_kit import BANKS, state_of
from tests.unit.rotation import rotation

# whose turn


@given(num_experts=st.integers(1, 40), layers=st.integers(1, 12), k=st.integers(1, 50), index=st.integers(0, 1000))
def test_every_expert_has_its_turn_within_one_rotation(num_experts, layers, k, index):
    banks = {f"blocks.{i}.moe.experts": num_experts for i in range(layers)}
    turns = range(index, index + ceil(num_experts / k))
    for bank in banks:
        chosen = [rotation(turn, banks, k)[bank] for turn in turns]
        assert {expert for turn in chosen for expert in turn} == set(range(num_experts))
        assert all(len(turn) == len(set(turn)) == min(k, num_experts) for turn in chosen)


@given(ep=st.sampled_from([1, 2, 4, 8]), layers=st.integers(1, 16), index=st.integers(0, 50))
def test_one_checkpoints_experts_are_spread_over_ranks(ep, layers, index):
    banks = {f"blocks.{i}.moe.experts": 16 for i in range(layers)}
    load = Counter(expert * ep // 16 for chosen in rotation(index, banks, 1).values() for expert in chosen)
    assert max(load.values()) <= ceil(layers / ep) + 1


def test_two_layers_start_half_a_rotation_apart():
    banks = {BANKS[0]: 8, BANKS[1]: 8}
    assert [rotation(i, banks, 1) for i in (0, 5)] == [{BANKS[0]: [0], BANKS[1]: [4]}, {BANKS[0]: [5], BANKS[1]: [1]}]


def test_modes_say_which_components_are_written():
    dense = Tensor("embedding.weight", "m", None, None, "float32", (1,), ())
    expert = Tensor("w", "m", BANKS[0], 3, "float32", (1,), ())
    assert is_written(dense, "experts", {BANKS[0]: []})
    assert is_written(expert, "experts", {BANKS[0]: [3]})
    assert not is_written(expert, "experts", {BANKS[0]: [2]})
    assert is_written(expert, "experts", None)
    assert is_written(expert, "full", {BANKS[0]: []})


# who writes


@given(world_ep=st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 3), (4, 2), (6, 3), (8, 4)]), sharded=st.booleans())
def test_every_value_is_written_by_exactly_one_of_its_holders(world_ep, sharded):
    world, ep = world_ep
    held = [parts_of(state_of(rank, world, ep, 1, sharded)) for rank in range(world)]
    for known in (None, merged(holdings_of(parts) for parts in held)):
        boxes: dict[str, list] = {part.tensor.key: [] for parts in held for part in parts}
        shapes = {part.tensor.key: part.tensor.shape for parts in held for part in parts}
        for rank, parts in enumerate(held):
            for part in my_parts(parts, rank, holdings=known):
                assert rank in part.holders
                boxes[part.tensor.key] += [(piece.offset, piece.shape) for piece in part.tensor.pieces]
        assert all(tiles(boxes[key], shapes[key]) for key in boxes)


@given(sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=60), world=st.integers(1, 8))
def test_replicated_bytes_are_balanced_up_to_one_tensor(sizes, world):
    parts = [dense_part(f"w{i}", size, tuple(range(world))) for i, size in enumerate(sizes)]
    loads = [sum(part.num_bytes for part in my_parts(parts, rank)) for rank in range(world)]
    assert sum(loads) == sum(part.num_bytes for part in parts)
    assert max(loads) - min(loads) <= max(part.num_bytes for part in parts)


def dense_part(name: str, size: int, holders: tuple[int, ...], dtype: str = "float32") -> Part:
    return Part(Tensor(name, "master", None, None, dtype, (size,), (Piece((0,), (size,), ""),)), holders)


def test_an_expert_has_one_writer_and_one_object():
    parts = parts_of(state_of(0, 4, 2, 1))
    for rank in (0, 2):
        objects = lay_out(my_parts(parts, rank))
        for plan in objects:
            if not plan.label.startswith("dense"):
                assert len({tensor.group for tensor in plan.tensors}) == 1
                assert {tensor.component for tensor in plan.tensors} == {"master", "m", "v", "step"}
                assert len(plan.tensors) == 8


@given(
    st.lists(
        st.tuples(st.integers(1, 100), st.sampled_from(["float32", "bfloat16", "float64", "int64"]), st.booleans()), min_size=1, max_size=20
    )
)
def test_the_objects_of_a_share_hold_every_part_one_after_the_other(made):
    parts = []
    for i, (size, dtype, scalar) in enumerate(made):
        shape = () if scalar else (size,)
        parts.append(Part(Tensor(f"w{i}", "master", None, None, dtype, shape, (Piece((0,) * len(shape), shape, ""),)), (0,), i))
    objects = lay_out(parts)
    assert sorted(number for plan in objects for number in plan.parts) == list(range(len(parts)))
    for plan in objects:
        position = 0
        for number, tensor in zip(plan.parts, plan.tensors, strict=True):
            assert tensor.pieces[0].start == position
            position += 0 if parts[number].is_value else parts[number].size
        assert position == plan.size


# boxes

interval = st.tuples(st.integers(0, 6), st.integers(1, 6))


@given(a=st.lists(interval, min_size=0, max_size=3), data=st.data())
def test_overlap_is_what_two_masks_have_in_common(a, data):
    b = data.draw(st.lists(interval, min_size=len(a), max_size=len(a)))
    masks = [np.zeros((12,) * len(a), bool) for _ in range(2)]
    for mask, box in zip(masks, (a, b), strict=True):
        mask[tuple(slice(o, o + s) for o, s in box)] = True
    (a_offset, a_shape), (b_offset, b_shape) = [(tuple(o for o, _ in box), tuple(s for _, s in box)) for box in (a, b)]
    found = overlap(a_offset, a_shape, b_offset, b_shape)
    common = masks[0] & masks[1]
    if found is None:
        assert not common.any()
        return
    for box, slices in zip((a, b), found, strict=True):
        mask = np.zeros_like(common)
        mask[tuple(slice(o + s.start, o + s.stop) for (o, _), s in zip(box, slices, strict=True))] = True
        assert np.array_equal(mask, common)


@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=3), data=st.data())
def test_cut_tensors_tile_and_any_change_is_noticed(shape, data):
    cuts = [sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=2))}) for n in shape]
    ranges = [list(pairwise(cut)) for cut in cuts]
    boxes = [(tuple(a for a, _ in box), tuple(b - a for a, b in box)) for box in product(*ranges)]
    assert tiles(boxes, tuple(shape))
    victim = data.draw(st.integers(0, len(boxes) - 1))
    assert not tiles(boxes[:victim] + boxes[victim + 1 :], tuple(shape))
    assert not tiles([*boxes, boxes[victim]], tuple(shape))
    offset, size = boxes[victim]
    assert not tiles([*boxes[:victim], ((offset[0] + 1, *offset[1:]), size), *boxes[victim + 1 :]], tuple(shape))


def test_a_scalar_is_tiled_by_itself_only():
    assert tiles([((), ())], ())
    assert not tiles([((), ()), ((), ())], ())
    assert not tiles([], ())


# one manifest from all receipts

SAVE = SaveId(1, 2)


def job(selection=None, parent=None, **changes) -> SaveJob:
    fields = {"folder": "x", "save": SAVE, "parent": parent, "rank": 0, "world": 2, "index": 1, "step": 20, "mode": "experts"}
    fields |= {"selection": selection, "objects": [], "tensors": [], "progress": {"step": 20}, "keep": 3, "timeout_seconds": 1.0}
    return SaveJob(**fields | changes)  # type: ignore[arg-type]


def half(rank: int, key: str = "w", bank: str | None = None, expert: int | None = None, written: bool = True) -> Tensor:
    pieces = (Piece((2 * rank,), (2,), f"object-{rank}"),) if written else ()
    return Tensor(key, "master", bank, expert, "float32", (4,), pieces)


def receipt(rank: int, tensors: list[Tensor], selection=None, **changes) -> Receipt:
    fields = {"rank": rank, "index": 1, "selection": selection, "objects": [ObjectRecord(f"object-{rank}", 20, 100, 0)], "tensors": tensors}
    return Receipt(**fields | changes)  # type: ignore[arg-type]


def test_halves_of_two_ranks_make_a_whole():
    manifest = merge(job(), [receipt(0, [half(0)]), receipt(1, [half(1)])], None, now=5.0)
    assert [piece.offset for piece in manifest.tensors["w:master"].pieces] == [(0,), (2,)]
    assert (manifest.full, manifest.new_bytes, manifest.time) == (True, 200, 5.0)
    assert Manifest.from_bytes(manifest.to_bytes(), "it") == manifest


def test_uncovered_or_doubly_covered_values_are_no_checkpoint():
    for second in ([half(1, written=False)], [half(0)]):
        with pytest.raises(CheckpointError, match="exactly once"):
            merge(job(), [receipt(0, [half(0)]), receipt(1, second)], None, 0.0)


def test_ranks_that_disagree_are_no_checkpoint():
    with pytest.raises(CheckpointError, match="rank 1 chose other experts"):
        merge(job(), [receipt(0, [half(0)]), receipt(1, [half(1)], {BANKS[0]: [1]})], None, 0.0)
    with pytest.raises(CheckpointError, match="rank 1 chose other experts"):
        merge(job(), [receipt(0, [half(0)]), receipt(1, [half(1)], index=2)], None, 0.0)
    other = Tensor("w", "master", None, None, "float32", (5,), ())
    with pytest.raises(CheckpointError, match="disagree about the shape"):
        merge(job(), [receipt(0, [half(0)]), receipt(1, [other])], None, 0.0)


def test_unselected_experts_come_from_the_parent_with_their_objects():
    selection = {BANKS[0]: [1]}
    expert = [half(rank, "e", BANKS[0], 0) for rank in range(2)]
    parent = merge(job(index=0), [receipt(r, [expert[r]], index=0) for r in range(2)], None, 0.0)
    later = [ObjectRecord("later", 20, 7, 0)]
    held = [half(rank, "e", BANKS[0], 0, written=False) for rank in range(2)]
    manifest = merge(job(selection, SaveId(1, 1)), [receipt(r, [held[r]], selection, objects=later) for r in range(2)], parent, 0.0)
    assert manifest.tensors["e:master:0"] == parent.tensors["e:master:0"]
    assert set(manifest.objects) == {"later", "object-0", "object-1"}
    assert manifest.new_bytes == 7
    for old in (None, merge(job(), [], None, 0.0)):
        with pytest.raises(CheckpointError, match="in no earlier checkpoint"):
            merge(job(selection), [receipt(r, [held[r]], selection) for r in range(2)], old, 0.0)


# small things


def test_sealed_bytes_show_every_change():
    data = seal(b'{"a": 1}')
    assert unseal(data, "it") == {"a": 1}
    for position in range(len(data)):
        bad = bytearray(data)
        bad[position] ^= 1
        with pytest.raises(CheckpointError, match="it is damaged"):
            unseal(bytes(bad), "it")
        with pytest.raises(CheckpointError, match="it is damaged"):
            unseal(data[:position], "it")


def test_save_ids_sort_by_age_and_survive_their_names():
    ids = [SaveId(1, 9), SaveId(1, 10), SaveId(2, 1)]
    assert sorted(ids) == sorted(ids, key=str) == ids
    assert [SaveId.parse(f"{save}.json") for save in ids] == ids
    assert SaveId.parse("notes.txt") is None


def test_layers_sort_as_numbers():
    assert sorted(["blocks.10.x", "blocks.9.x"], key=natural) == ["blocks.9.x", "blocks.10.x"]


@pytest.mark.parametrize(
    "change", [{"mode": "half"}, {"experts_per_save": 0}, {"keep": 0}, {"every_steps": -1}, {"full_every": -1}, {"timeout_seconds": 0.0}]
)
def test_bad_settings_are_named(change):
    (name,) = change
    with pytest.raises(ConfigError, match=f"checkpoint.{name}="):
        CheckpointConfig(**change).check()
    CheckpointConfig().check()


def test_sizes_count_the_elements_of_boxes():
    part = dense_part("w", 6, (0,), "bfloat16")
    assert part.num_bytes == 12 == prod(part.tensor.shape) * 2
