"""The collective-order check: ranks that agree start; ranks that would call in different orders are told before anything travels."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist

from moetrain.base.errors import TrainingError
from moetrain.dist.comm import Exchange
from moetrain.dist.mesh import Mesh
from moetrain.dist.order import Rehearsal, compare
from moetrain.dist.world import World
from moetrain.model.config import AttentionConfig, ModelConfig, ShortcutConfig
from moetrain.optim.config import OptimConfig
from moetrain.parallel.config import EngineConfig, OverlapConfig, ParallelConfig
from moetrain.parallel.gradients import GradientSync
from moetrain.parallel.native import TorchEngine
from moetrain.parallel.plan import Batch
from moetrain.parallel.rehearsal import check_order, facts, rehearse
from moetrain.routing.config import RoutingConfig
from tests.kit import run_ranks

SHAPE = Batch(sequences=8, seq_len=8, micro_batch_size=1, accumulation=2)
SETTINGS = EngineConfig(autocast="off")


def model_config(hidden_size: int = 16) -> ModelConfig:
    attention = AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=4)
    routing = RoutingConfig(num_experts=4, top_k=2, auxiliary_loss_scope="global_batch", bias_update_rate=0.01)
    return ModelConfig(vocab_size=31, hidden_size=hidden_size, num_layers=3, pattern=["scmoe", "moe"], attention=attention, routing=routing)


EVERY_KIND = ["dense", "moe", "shared", "shortcut", "scmoe", "dgmoe", "dgmoe"]  # the last two pairs share a bank


def every_kind() -> ModelConfig:
    shortcut = ShortcutConfig(positions=[1, 2, 3], pairs_per_bank=2)
    return replace(model_config(), num_layers=10, pattern=EVERY_KIND, shared_gate="cg2", shortcut=shortcut)


def engine_of(world: World, parallel: ParallelConfig, model: ModelConfig | None = None) -> TorchEngine:
    return TorchEngine(model or model_config(), parallel, SETTINGS, OptimConfig(grad_clip=1.0), world, Mesh(world, parallel.ep))


class NothingTravels:
    """Fails the test if a live process group is asked for anything while it is open."""

    CALLS = ("all_reduce", "broadcast", "all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor", "barrier")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.live: list[str] = []
        for name in self.CALLS:
            monkeypatch.setattr(dist, name, self._watched(name, getattr(dist, name)))

    def _watched(self, name: str, call: Callable[..., object]) -> Callable[..., object]:
        def watched(*args: object, group: dist.ProcessGroup | None = None, **kwargs: object) -> object:
            if group is None or dist.get_backend(group) != "fake":
                self.live.append(name)
            return call(*args, group=group, **kwargs)

        return watched


def refused(check: Callable[[], None]) -> str:
    """The sentence with which it is refused within 20 seconds, without a live call; empty if it is not."""
    started = time.monotonic()
    with pytest.MonkeyPatch.context() as monkeypatch:
        nothing = NothingTravels(monkeypatch)
        try:
            check()
        except TrainingError as error:
            return str(error)
        finally:
            assert not nothing.live and time.monotonic() - started < 20
    return ""


def every_fold(world: World) -> list[str]:
    folds = [ParallelConfig(ep=ep, dense=dense) for ep, dense in ((1, "fsdp"), (2, "fsdp"), (2, "replicate"), (4, "replicate"))]
    state = torch.random.get_rng_state()
    engines = [engine_of(world, fold, every_kind() if fold.ep == 2 else None) for fold in folds]
    sentences = [refused(lambda f=f, e=e: check_order(e, f, SETTINGS, SHAPE)) for f, e in zip(folds, engines, strict=True)]
    assert torch.equal(torch.random.get_rng_state(), state)
    world.barrier("the real groups still work")
    return sentences


def calls_of_a_step(world: World) -> list[str]:
    """With their groups."""
    parallel = ParallelConfig(ep=2, dense="fsdp")
    return [f"{call.group.name}: {call.text}" for call in rehearse(engine_of(world, parallel), parallel, SETTINGS, SHAPE).calls]


def bank_calls(world: World) -> list[tuple[int, int]]:
    """All-gathers and reduce-scatters of expert weights in a step: one chunk, three, three with recomputation; DGMoE's double gating too."""
    counts = []
    for chunks, recompute in ((1, False), (3, False), (3, True)):
        parallel = ParallelConfig(ep=2, dense="fsdp", overlap=OverlapConfig(chunks=chunks))
        settings = replace(SETTINGS, recompute=recompute)
        engine = TorchEngine(every_kind(), parallel, settings, OptimConfig(), world, Mesh(world, parallel.ep))
        calls = [call.text for call in rehearse(engine, parallel, settings, SHAPE).calls if call.group.name == "edp"]
        counts.append((sum(text.startswith("allgather") for text in calls), sum(text.startswith("reduce_scatter") for text in calls)))
    return counts


def swapped_pair(world: World) -> str:
    """In one group: rank 2 of four starts its exchange before the sum that the others make first."""
    with Rehearsal(world) as stage:
        axis = Mesh(stage, 2).ep
        for is_exchange in (True, False) if world.rank == 2 else (False, True):
            if is_exchange:
                Exchange("rows to experts", torch.ones(2 + world.rank, 3), [1, 1 + world.rank], [1, 1], axis).wait()
            else:
                axis.sum_(torch.ones(5))
    return refused(lambda: compare(stage, world))


def ring_of_pairs(world: World) -> str:
    """Ranks 1 and 2 of four sum over edp before ep, ranks 0 and 3 after it: every rank would wait for another of the four."""
    with Rehearsal(world) as stage:
        mesh = Mesh(stage, 2)
        axes = mesh.ep, mesh.edp
        for axis in reversed(axes) if world.rank in (1, 2) else axes:
            axis.sum_(torch.ones(5))
    return refused(lambda: compare(stage, world))


def swapped_sums(world: World) -> str:
    """Rank 1 adds up dense gradients before experts: two groups with the same members, so each of them alone looks the same."""
    parallel = ParallelConfig(ep=1)
    engine = engine_of(world, parallel)
    with pytest.MonkeyPatch.context() as monkeypatch:
        if world.rank == 1:
            monkeypatch.setattr(GradientSync, "reduce", last_first)
        return refused(lambda: check_order(engine, parallel, SETTINGS, SHAPE))


def last_first(gradients: GradientSync) -> None:
    for piece in reversed(gradients.pieces):
        piece.make()


def other_sizes(world: World) -> list[str]:
    """Rank 1 has another width, then one micro-batch more, then other experts; without the check nobody is refused."""
    parallel = ParallelConfig(ep=2)
    wide = engine_of(world, parallel, model_config(hidden_size=16 + 8 * (world.rank == 1)))
    same = engine_of(world, parallel)
    longer = replace(SHAPE, accumulation=2 + (world.rank == 1))
    unchecked = replace(parallel, check_order=False)
    placed = replace(parallel, placement_seed=3 if world.rank == 1 else None)
    return [
        refused(lambda: check_order(wide, parallel, SETTINGS, SHAPE)),
        refused(lambda: check_order(same, parallel, SETTINGS, longer)),
        refused(lambda: check_order(engine_of(world, placed), placed, SETTINGS, SHAPE)),
        refused(lambda: check_order(same, unchecked, SETTINGS, longer)),
    ]


@dataclass
class Outcome:
    """Of one rank."""

    every_fold: list[str]
    calls: list[str]
    bank_calls: list[tuple[int, int]]
    swapped_pair: str
    ring_of_pairs: str
    swapped_sums: str
    other_sizes: list[str]


def on_every_rank(world: World) -> Outcome:
    swapped = swapped_pair(world), ring_of_pairs(world), swapped_sums(world)
    return Outcome(every_fold(world), calls_of_a_step(world), bank_calls(world), *swapped, other_sizes(world))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    """One start of four ranks for all tests: a process costs seconds."""
    return run_ranks(on_every_rank, 4, tmp_path_factory.mktemp("order"))


@pytest.mark.dist
def test_ranks_that_agree_start_in_every_fold(outcomes: list[Outcome]) -> None:
    assert [outcome.every_fold for outcome in outcomes] == [[""] * 4] * 4


@pytest.mark.dist
def test_the_calls_of_the_engine_and_of_fsdp_are_seen(outcomes: list[Outcome]) -> None:
    calls = outcomes[0].calls
    of_exchanges = [call for call in calls if call.startswith("ep:") and call.endswith("rows to experts")]
    # 2 banks, 2 micro-batches, forward and backward; the number of rows is each rank's own business
    assert of_exchanges == [*["ep: alltoall_base of float32 ['rows', 8] in: rows to experts"] * 2,
                            *["ep: alltoall_base of float32 ['rows', 8] in: gradient of rows to experts"] * 2] * 2  # fmt: skip
    assert any(call.startswith("dp: allgather_base") and call.endswith("in: the forward pass") for call in calls)
    assert any(call.startswith("dp: reduce_scatter_base") and call.endswith("in: the backward pass") for call in calls)
    assert any(call.startswith("edp: reduce_scatter_base") for call in calls)


@pytest.mark.dist
def test_a_sharded_bank_is_gathered_and_reduced_once_for_all_chunks_and_gatings(outcomes: list[Outcome]) -> None:
    visits = 6  # of banks by blocks: all but the dense one, a pair of DGMoE-Share each
    gathers, sums = 2 * 2 * visits, visits  # forward and backward of two micro-batches; the last backward
    assert [outcome.bank_calls for outcome in outcomes] == [[(gathers, sums)] * 3] * 4


@pytest.mark.dist
def test_a_swapped_pair_of_calls_is_named_before_anything_travels(outcomes: list[Outcome]) -> None:
    sentences = [outcome.swapped_pair for outcome in outcomes]
    assert sentences[0] == sentences[1] == ""  # their own group agrees
    assert sentences[2] == sentences[3]
    assert sentences[2].startswith(
        "Ranks 2 and 3 are about to make different collective calls in the group ep of ranks 2-3: as number 1, "
        "rank 2 has [alltoall_base of float32 ['rows', 3] in: rows to experts] and rank 3 has [allreduce of float32 [5] in: sum over ep]."
    )


@pytest.mark.dist
def test_pairs_that_would_wait_for_each_other_in_a_ring_are_told(outcomes: list[Outcome]) -> None:
    (sentence,) = {outcome.ring_of_pairs for outcome in outcomes}
    assert "Ranks 0 and 1 are about to make different collective calls in the group" in sentence
    assert "rank 0 has [a call on the ep axis with other ranks] and rank 1 has [a call on the edp axis with other ranks]" in sentence


@pytest.mark.dist
def test_an_order_swapped_between_two_groups_is_found_in_the_engine(outcomes: list[Outcome]) -> None:
    (sentence,) = {outcome.swapped_sums for outcome in outcomes}
    assert "Ranks 0 and 1 are about to make different collective calls in the group" in sentence
    assert "sum over dp]" in sentence and "sum over edp]" in sentence


@pytest.mark.dist
def test_other_widths_and_other_numbers_of_micro_batches_are_named(outcomes: list[Outcome]) -> None:
    for wide, longer, placed, unchecked in [outcome.other_sizes for outcome in outcomes]:
        assert "float32 parameters of shapes" in wide
        assert "a step of 2 micro-batches" in longer and "a step of 3 micro-batches" in longer
        assert placed.count("float32 parameters of shapes") == 2 and "settings" in placed
        assert unchecked == ""


def test_a_rank_that_computes_elsewhere_or_otherwise_differs_in_what_is_compared() -> None:
    world, parallel = World.single(torch.device("cpu")), ParallelConfig(ep=1)
    engine = engine_of(world, parallel)
    mine = facts(engine, parallel, SETTINGS, SHAPE)
    assert mine == facts(engine_of(world, parallel), replace(parallel), replace(SETTINGS), replace(SHAPE))
    engine.world = World.single(torch.device("cuda"))
    assert facts(engine, parallel, SETTINGS, SHAPE) == mine.replace("tokens on cpu", "tokens on cuda") != mine
    for other in (replace(SETTINGS, recompute=True), replace(SETTINGS, experts="bmm")):
        assert facts(engine_of(world, parallel), parallel, other, SHAPE) != mine


def test_one_rank_has_nobody_to_disagree_with() -> None:
    world = World.single(torch.device("cpu"))
    parallel = ParallelConfig(ep=1)
    check_order(engine_of(world, parallel), parallel, SETTINGS, SHAPE)
    assert not dist.is_initialized()
