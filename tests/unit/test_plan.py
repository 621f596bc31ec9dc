"""The plan's arithmetic: against hand computation, brute force, published figures and the real engine's state."""

from math import ceil, prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetrain.base.errors import ConfigError, PlanError
from moetrain.model.config import AttentionConfig, ModelConfig
from moetrain.model.count import count_parameters
from moetrain.model.shapes import is_expert, parameter_shapes
from moetrain.parallel.config import EngineConfig, ParallelConfig
from moetrain.parallel.plan import (
    Axes,
    Batch,
    Saving,
    activation_bytes_per_token,
    all_to_all_bytes,
    axes,
    checkpoint_size,
    make_plan,
    memory,
    split_batch,
)
from moetrain.routing.config import RoutingConfig

NOTHING = frozenset[str]()
EVERYTHING = frozenset({"master", "m", "v", "step"})


def tiny(num_experts: int = 4, top_k: int = 2, pattern: tuple[str, ...] = ("moe",), **routing: float) -> ModelConfig:
    attention = AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=4)
    gate = RoutingConfig(num_experts=num_experts, top_k=top_k, **routing)  # pyright: ignore[reportArgumentType]
    return ModelConfig(
        vocab_size=32,
        hidden_size=8,
        num_layers=2,
        pattern=list(pattern),
        ffn_size=16,
        expert_ffn_size=12,
        attention=attention,
        routing=gate,
    )


def test_auto_ep_is_the_one_of_the_mesh() -> None:
    from moetrain.dist.mesh import auto_ep

    for world in range(1, 33):
        for num_experts in (1, 2, 6, 8):
            layout = axes(tiny(num_experts, top_k=1), ParallelConfig(), world)
            assert layout.ep == auto_ep(world, num_experts)
            assert (layout.dp, layout.edp * layout.ep) == (world, world)


def test_dense_model_has_no_expert_axis() -> None:
    assert axes(tiny(pattern=("dense",)), ParallelConfig(), 4) == Axes(4, 1)
    with pytest.raises(ConfigError, match="without routed experts"):
        axes(tiny(pattern=("dense",)), ParallelConfig(ep=2), 4)


@pytest.mark.parametrize(
    ("ep", "sentence"), [(3, "divide the world of 8"), (8, "leaves ranks without an expert"), (-1, "divide the world")]
)
def test_impossible_ep_names_the_possible(ep: int, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as error:
        axes(tiny(), ParallelConfig(ep=ep), 8)
    assert error.value.hint == "Possible: 1, 2, 4, or 0 for auto."


def test_no_world_is_refused() -> None:
    with pytest.raises(PlanError):
        axes(tiny(), ParallelConfig(), 0)


@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 40), st.integers(1, 8), st.booleans(), st.booleans())
def test_batch_keeps_the_global_batch(
    seq_len: int, world: int, micro: int, accumulation: int, give_micro: bool, give_accumulation: bool
) -> None:
    tokens = world * micro * accumulation * seq_len
    batch = split_batch(tokens, seq_len, micro * give_micro, accumulation * give_accumulation, world)
    assert batch.tokens == tokens
    assert world * batch.micro_batch_size * batch.accumulation == batch.sequences
    if give_micro:
        assert batch.micro_batch_size == micro
    if give_accumulation:
        assert batch.accumulation == accumulation


def test_auto_micro_batch_is_at_most_eight() -> None:
    assert split_batch(24 * 16, 16, 0, 0, 1) == Batch(24, 16, 8, 3)
    assert split_batch(11 * 16, 16, 0, 0, 1) == Batch(11, 16, 1, 11)


@pytest.mark.parametrize(
    ("arguments", "key", "hint"),
    [
        ((1000, 256, 0, 0, 1), "train.global_batch_tokens", "Use 1024."),
        ((4096, 256, 0, 0, 3), "train.global_batch_tokens", "Use 4608, or a number of ranks that divides 16."),
        ((4096, 256, 3, 0, 2), "train.micro_batch_size", "Possible: 1, 2, 4, 8, or 0 for auto."),
        ((4096, 256, 0, 3, 2), "train.accumulation", "Possible: 1, 2, 4, 8, or 0 for auto."),
        ((4096, 256, 4, 3, 2), "train.accumulation", "Use 0 to derive it."),
    ],
)
def test_uneven_batch_is_refused_with_a_way_out(arguments: tuple[int, int, int, int, int], key: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=key) as error:
        split_batch(*arguments)
    assert error.value.hint == hint


def test_memory_of_replicated_ranks_by_hand() -> None:
    model, count = tiny(num_experts=6), count_parameters(tiny(num_experts=6))
    held = count.dense + 2 * 2 * count.per_expert  # two banks, ceil(6 / 4) experts
    used = memory(model, ParallelConfig(), EngineConfig(), Axes(4, 4), Batch(4, 16, 1, 1), low_precision=True)
    assert (used.weights, used.gradients, used.optimizer) == (4 * held, 4 * held, 8 * held)
    assert used.copies == 2 * held
    assert used.gathered == 0
    assert used.logits == 16 * 32 * 2
    assert used.exchange == 2 * 16 * 2 * 8 * 4  # send and receive, 16 tokens to 2 experts, 8 values of 4 bytes
    assert used.total == 18 * held + used.logits + used.exchange + used.activations


def test_fsdp_shards_dense_over_all_ranks_and_whole_experts_over_their_copies() -> None:
    model, count = tiny(num_experts=3, top_k=1), count_parameters(tiny(num_experts=3, top_k=1))
    fsdp = ParallelConfig(dense="fsdp")
    used = memory(model, fsdp, EngineConfig(), Axes(4, 1), Batch(4, 16, 1, 1), low_precision=False)
    assert used.weights == 4 * (ceil(count.dense / 4) + 2 * 1 * count.per_expert)  # ceil(3 experts / 4 copies) = 1
    assert used.gathered > 0
    alone = memory(model, fsdp, EngineConfig(), Axes(1, 1), Batch(4, 16, 4, 1), low_precision=False)
    assert alone.weights == 4 * count.total


def test_gradients_stay_whole_between_the_micro_batches_of_a_step() -> None:
    model, count = tiny(num_experts=3, top_k=1), count_parameters(tiny(num_experts=3, top_k=1))
    batches = Batch(4, 16, 1, 1), Batch(4, 16, 1, 3)
    once, thrice = (memory(model, ParallelConfig(dense="fsdp"), EngineConfig(), Axes(4, 1), batch, False) for batch in batches)
    assert once.gradients == once.weights
    assert thrice.gradients == 4 * count.total, "FSDP2 reduces in the last backward only"


def test_one_rank_exchanges_nothing() -> None:
    assert memory(tiny(), ParallelConfig(), EngineConfig(), Axes(1, 1), Batch(4, 16, 4, 1), False).exchange == 0
    assert all_to_all_bytes(tiny(), Axes(4, 1), Batch(4, 16, 1, 1), 4, False) == 0


def test_activations_grow_with_layers_and_shrink_with_recomputation() -> None:
    plain = activation_bytes_per_token(tiny(pattern=("moe",)), 4, 2, recompute=False)
    assert activation_bytes_per_token(tiny(pattern=("dense", "moe")), 4, 2, recompute=False) < plain
    assert activation_bytes_per_token(tiny(pattern=("moe",)), 4, 2, recompute=True) < plain
    assert activation_bytes_per_token(tiny(pattern=("moe",), capacity_factor=0.5), 4, 2, recompute=False) < plain


def test_all_to_all_counts_every_row_out_and_back_and_both_gradients() -> None:
    batch = Batch(sequences=24, seq_len=16, micro_batch_size=2, accumulation=3)
    tokens, layers, top_k, hidden = 6 * 16, 2, 2, 8
    rows = tokens * top_k * layers * 3 / 4  # a quarter of the experts is here
    assert all_to_all_bytes(tiny(), Axes(4, 4), batch, 4, low_precision=False) == rows * hidden * 4 * 4
    assert all_to_all_bytes(tiny(pattern=("dgmoe",)), Axes(4, 4), batch, 4, low_precision=False) == rows * hidden * 4 * 4  # one pair, twice
    assert all_to_all_bytes(tiny(), Axes(4, 4), batch, 4, low_precision=True) == rows * hidden * 2 * (4 + 2)
    assert all_to_all_bytes(tiny(capacity_factor=0.5), Axes(4, 4), batch, 4, low_precision=False) == rows / 2 * hidden * 4 * 4


def test_rows_in_bfloat16_on_the_wire_are_planned() -> None:
    saving, batch = Saving(NOTHING, 1, 0, 1), Batch(4, 16, 1, 1)
    exact, bfloat16 = EngineConfig(autocast="off"), EngineConfig(autocast="bfloat16")
    planned = {
        (wire, engine.autocast): make_plan(tiny(), ParallelConfig(wire_dtype=wire), engine, Axes(4, 4), batch, saving, 64).all_to_all_bytes
        for wire in ("same", "bfloat16", "auto")
        for engine in (exact, bfloat16)
    }
    assert planned["same", "off"] == 2 * planned["bfloat16", "off"]
    assert planned["auto", "off"] == planned["same", "off"]
    assert planned["auto", "bfloat16"] == planned["bfloat16", "bfloat16"]
    assert planned["same", "bfloat16"] == 1.5 * planned["bfloat16", "bfloat16"]  # rows back are in bfloat16 already


@pytest.mark.parametrize("bias_rate", [0.0, 0.001])
def test_full_checkpoint_is_the_state_of_the_real_engine(bias_rate: float) -> None:
    from moetrain.dist.mesh import Mesh
    from moetrain.dist.world import World
    from moetrain.optim.config import OptimConfig
    from moetrain.parallel.native import TorchEngine

    model = tiny(pattern=("scmoe",), bias_update_rate=bias_rate)
    world = World.single()
    engine = TorchEngine(model, ParallelConfig(), EngineConfig(), OptimConfig(), world, Mesh(world, 1))
    state = engine.state()
    size = checkpoint_size(model, 4, 1, Saving(NOTHING, 1, 0, 3))
    assert size.full == sum(fragment.num_bytes for fragment in state)
    written = [fragment for fragment in state if fragment.expert in (None, 2)]
    assert size.partial == sum(fragment.num_bytes for fragment in written)


def test_partial_checkpoint_has_the_papers_share() -> None:
    """GPT-350M-16E with one of 16 experts per layer, master and moments partial: 19.1 % of a full one (arXiv 2408.04307, recomputed)."""
    attention = AttentionConfig(num_heads=16, num_kv_heads=16)
    model = ModelConfig(
        vocab_size=50257,
        hidden_size=1024,
        num_layers=24,
        pattern=["dense", "moe"],
        ffn_size=2736,
        expert_ffn_size=2736,
        attention=attention,
        routing=RoutingConfig(num_experts=16),
    )
    size = checkpoint_size(model, 4, 64, Saving(NOTHING, 1, 0, 3))
    assert size.partial / size.full == pytest.approx(0.191, abs=0.002)
    assert size.partial_per_rank == ceil(size.partial / 64)


@pytest.mark.parametrize("mode", ["experts", "weights16", "moments", "full"])
def test_partial_checkpoint_of_every_mode_is_what_its_rule_writes(mode: str) -> None:
    """Counted component by component with the rule that saving uses: K = 1 of 4 experts."""
    from moetrain.checkpoint.modes import ALWAYS_WRITTEN, is_written
    from moetrain.store.manifest import Tensor

    model = tiny(num_experts=4)
    bytes_of = {"master": 4, "m": 4, "v": 4, "weight16": 2}
    expected = 0
    for name, shape in parameter_shapes(model).items():
        experts = range(4) if is_expert(name) else [None]
        for expert in experts:
            values = prod(shape[1:] if expert is not None else shape)
            for component in (*bytes_of, "step"):
                bank = None if expert is None else name.rpartition(".")[0]
                if expert is None and component == "weight16":
                    continue
                selection = {key: [2] for key in model.banks()}
                if is_written(Tensor(name, component, bank, expert, "", (), ()), mode, selection):
                    expected += 8 if component == "step" else values * bytes_of[component]
    assert checkpoint_size(model, 4, 1, Saving(ALWAYS_WRITTEN[mode], 1, 0, 1)).partial == expected


def test_always_written_components_make_partial_checkpoints_larger() -> None:
    sizes = [checkpoint_size(tiny(), 4, 1, Saving(always, 1, 0, 1)) for always in (NOTHING, frozenset({"master"}), EVERYTHING)]
    assert sizes[0].partial < sizes[1].partial < sizes[2].partial == sizes[2].full == sizes[0].full


@pytest.mark.parametrize(("selected", "keep", "full_every"), [(1, 1, 0), (1, 3, 0), (2, 5, 0), (1, 4, 2), (3, 4, 1)])
def test_storage_is_enough_for_every_object_that_kept_points_refer_to(selected: int, keep: int, full_every: int) -> None:
    """A thousand saves with rotating experts; distinct objects under the newest `keep` recovery points, at the worst moment."""
    num_experts = 4
    model = tiny(num_experts)
    saving = Saving(NOTHING, selected, full_every, keep)
    newest = dict.fromkeys(range(num_experts), 0)
    points: list[dict[int, int]] = [dict(newest)]
    most = 0
    for save in range(1, 1001):
        full = full_every and save % full_every == 0
        chosen = range(num_experts) if full else [(save * selected + i) % num_experts for i in range(selected)]
        newest |= dict.fromkeys(chosen, save)
        points = [*points, dict(newest)][-keep:]
        if len(points) == keep:
            most = max(most, len({pair for point in points for pair in point.items()}))
    size = checkpoint_size(model, 4, 1, saving)
    nothing = checkpoint_size(model, 4, 1, Saving(NOTHING, 0, 0, 1))
    expert = (size.full - nothing.partial) // num_experts
    assert size.stored == keep * nothing.partial + most * expert


def test_dense_model_has_only_full_checkpoints() -> None:
    size = checkpoint_size(tiny(pattern=("dense",)), 4, 1, Saving(NOTHING, 1, 0, 2))
    assert size.partial == size.full
    assert size.stored == 2 * size.full


def test_table_shows_every_number_and_the_notes() -> None:
    from rich.console import Console

    from moetrain.parallel.plan_table import render

    plan = make_plan(
        tiny(6),
        ParallelConfig(dense="fsdp"),
        EngineConfig(),
        Axes(8, 4),
        Batch(16, 16, 2, 1),
        Saving(NOTHING, 1, 0, 3),
        5000,
        ("It cannot.",),
    )
    assert plan.num_steps == ceil(5000 / 256)
    console = Console(width=80, record=True, file=None, force_terminal=False)
    with console.capture() as captured:
        console.print(render(plan, "tiny"))
    text = captured.get()
    for shown in (
        "tiny on 8 ranks",
        "1 or 2 experts",
        f"{plan.parameters.total:,}",
        "gathered parameters",
        "all-to-all per step",
        "It cannot.",
    ):
        assert shown in text
    assert all(len(line) <= 80 for line in text.splitlines())
