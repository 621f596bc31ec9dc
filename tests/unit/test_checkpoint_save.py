"""Saving and resuming: partial checkpoints, other layouts, which experts and recovery points stay."""

import pytest
import torch

from moetrain.base.clock import SystemClock
from moetrain.base.errors import CheckpointError
from moetrain.checkpoint.checkpointer import Checkpointer
from moetrain.checkpoint.config import CheckpointConfig
from moetrain.checkpoint.recover import agreed_choice, alone, restore
from moetrain.model.state import Box, Fragment
from tests.unit.checkpoint_kit import BANKS, Job, LocalNode, assert_equal, expected, experts_by_step, manifests, state_of


def test_first_save_is_full_and_comes_back_bit_for_bit(tmp_path):
    job = Job(tmp_path, 1, 1)
    assert job.load()[0] is None
    job.save(10)
    report, whole = Job(tmp_path, 1, 1).load("must")
    assert_equal(whole, expected(10))
    assert report is not None
    assert (report.step, report.seq, report.progress) == (10, 1, {"step": 10, "samples": 80})
    assert set(report.ages.values()) == {0}


def test_partial_saves_write_k_experts_per_layer_and_keep_the_rest_by_reference(tmp_path):
    job = Job(tmp_path, 2, 2, experts_per_save=1, keep=10)
    for step in (10, 20, 30, 40, 50):
        assert all(pending.committed for pending in job.save(step))
    points = manifests(tmp_path)
    assert [point.full for point in points] == [False] * 4 + [True]
    for point in points[:-1]:
        fresh = [group for group, age in point.ages().items() if age == 0]
        assert sorted(bank for bank, _ in fresh) == sorted(BANKS)
        assert point.new_bytes < points[-1].new_bytes
    assert max(points[0].ages().values()) == 30  # after E / K partial checkpoints nobody is as old as the full one
    report, whole = Job(tmp_path, 2, 2).load()
    assert_equal(whole, expected(50, experts_by_step(points[0])))
    assert report is not None
    assert report.ages == points[0].ages()


def test_an_experts_own_adam_step_is_as_old_as_its_moments(tmp_path):
    job = Job(tmp_path, 1, 1)
    job.save(10)
    job.save(20)
    (point, _) = manifests(tmp_path)
    assert point.adam_steps() == experts_by_step(point)


def test_last_save_is_full_on_request_and_every_nth_by_configuration(tmp_path):
    job = Job(tmp_path, 1, 1, full_every=3, keep=10)
    for step in range(1, 6):
        job.save(step, full=step == 5)
    assert [point.full for point in manifests(tmp_path)] == [True, True, False, False, True]
    job = Job(tmp_path / "all", 1, 1, mode="full", keep=10)
    job.save(1)
    job.save(2)
    assert [point.full for point in manifests(tmp_path / "all")] == [True, True]


def test_rotation_goes_on_after_a_resume_without_a_new_full_save(tmp_path):
    job = Job(tmp_path, 1, 1, keep=10)
    job.save(1)
    job.save(2)
    again = Job(tmp_path, 2, 2, keep=10)
    again.load()
    again.save(3)
    newest, before, _ = manifests(tmp_path)
    assert not newest.full
    assert newest.parent == before.save
    assert newest.index == 2
    assert not {g for g, age in newest.ages().items() if age == 0} & {g for g, age in before.ages().items() if age == 0}


@pytest.mark.parametrize("sharded", [False, True])
def test_any_layout_resumes_what_another_saved(tmp_path, sharded):
    experts = {}
    layouts = [(4, 4, sharded), (4, 2, True), (2, 2, sharded), (1, 1, False), (3, 3, sharded), (4, 4, sharded), (2, 1, True)]
    for step, (world, ep, cut) in enumerate(layouts, 1):
        job = Job(tmp_path, world, ep, cut, experts_per_save=2)
        report, whole = job.load()
        if report is not None:
            assert_equal(whole, expected(step - 1, experts))
            assert any(f"is loaded by {world}" in line for line in report.remapped) == (manifests(tmp_path)[0].world != world)
        assert all(pending.committed for pending in job.save(step))
        experts = experts_by_step(manifests(tmp_path)[0])
    assert manifests(tmp_path)[0].step == len(layouts)


def test_replicas_share_the_writing(tmp_path):
    Job(tmp_path, 4, 2).save(1)
    (point,) = manifests(tmp_path)
    by_rank = {rank: sum(r.num_bytes for r in point.objects.values() if f"/{rank:05d}-" in r.name) for rank in range(4)}
    assert all(by_rank.values())
    assert point.ep == 2


def test_another_number_type_is_converted_and_said(tmp_path):
    Job(tmp_path, 1, 1).save(1)
    state = state_of(0, 1, 1, -1)
    for piece in state:
        piece.data = piece.data.to(torch.float64) if piece.component != "step" else piece.data
    choice = agreed_choice(tmp_path, "must")
    assert choice is not None
    report = restore(choice, state, 1)
    assert report.is_converted
    assert "float32 to float64" in report.remapped[0]
    assert torch.equal(state[0].data.float(), expected(1)[state[0].key])


def test_bfloat16_and_empty_arrays_round_trip(tmp_path):
    state = [
        Fragment("a", "master", None, None, (7,), Box.whole((7,)), (0,), torch.randn(7).bfloat16()),
        Fragment("b", "step", None, None, (), Box.whole(()), (0,), torch.tensor(3)),
        Fragment("c", "step", "blocks.0.moe.experts", 0, (), Box.whole(()), (0,), torch.tensor(5)),
    ]
    saved = [piece.data.clone() for piece in state]
    one = Checkpointer(tmp_path, CheckpointConfig(), 0, 1, alone, SystemClock(), LocalNode())
    one.save(state, {"step": 1})
    one.finish()
    for piece in state:
        piece.data.zero_()
    one.load(state, "must")
    assert all(torch.equal(piece.data, old) for piece, old in zip(state, saved, strict=True))


def test_keep_limits_recovery_points_and_everything_they_need_stays(tmp_path):
    job = Job(tmp_path, 1, 1, keep=2)
    for step in range(1, 8):
        job.save(step)
    points = manifests(tmp_path)
    assert [point.step for point in points] == [7, 6]
    on_disk = {str(path.relative_to(tmp_path / "objects")) for path in (tmp_path / "objects").glob("*/*/*")}
    assert on_disk == set(points[0].objects) | set(points[1].objects)
    assert_equal(Job(tmp_path, 1, 1).load()[1], expected(7, experts_by_step(points[0])))


def test_resume_words(tmp_path):
    job = Job(tmp_path / "run" / "checkpoint", 1, 1)
    assert job.load("auto")[0] is None
    with pytest.raises(CheckpointError, match="no checkpoint"):
        job.load("must")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        job.load(str(tmp_path / "elsewhere"))
    job.save(4)
    assert job.load("never")[0] is None
    other = Job(tmp_path / "other" / "checkpoint", 1, 1)
    report, whole = other.load(str(tmp_path / "run"))
    assert_equal(whole, expected(4))
    assert report is not None
    other.save(5)
    assert manifests(tmp_path / "other" / "checkpoint")[0].full  # refers to nothing in the other folder


def test_a_model_of_another_shape_is_refused_before_anything_changes(tmp_path):
    Job(tmp_path, 1, 1).save(1)
    state = state_of(0, 1, 1, -1)
    before = [piece.data.clone() for piece in state]
    state.append(Fragment("new.weight", "master", None, None, (2,), Box.whole((2,)), (0,), torch.zeros(2)))
    choice = agreed_choice(tmp_path, "must")
    assert choice is not None
    with pytest.raises(CheckpointError, match=r"has no new\.weight:master"):
        restore(choice, state, 1)
    assert all(torch.equal(piece.data, old) for piece, old in zip(state, before, strict=False))


def test_a_model_that_lacks_what_was_saved_is_refused_before_anything_changes(tmp_path):
    Job(tmp_path, 2, 2).save(1)
    job = Job(tmp_path, 1, 1)
    state = [piece for piece in state_of(0, 1, 1, -1) if piece.bank != BANKS[1]]
    before = [piece.data.clone() for piece in state]
    with pytest.raises(CheckpointError, match=rf"of step 1 has {BANKS[1]}\.\S+ and 31 more, which this model lacks"):
        job.ranks[0].load(state, "auto")
    assert all(torch.equal(piece.data, old) for piece, old in zip(state, before, strict=True))
    choice = agreed_choice(tmp_path, "must")
    assert choice is not None
    assert restore(choice, state, 1).step == 1, "an export reads what it needs"


def test_state_may_change_after_wait_copied(tmp_path):
    job = Job(tmp_path, 1, 1)
    state = job.states(1)[0]
    job.ranks[0].save(state, {"step": 1})
    job.ranks[0].wait_copied()
    for piece in state:
        piece.data.zero_()
    job.ranks[0].finish()
    assert_equal(Job(tmp_path, 1, 1).load()[1], expected(1))


def test_a_save_that_comes_too_early_is_made_a_little_later(tmp_path):
    job = Job(tmp_path, 2, 1)
    started = [pending for step in (1, 2) for pending in job.start(step)]
    assert all(pending.done.wait(60) for pending in started)
    assert all(pending.committed for pending in started)
