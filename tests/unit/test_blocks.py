"""Every kind of block against its equations, and what no schedule may change."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moetrain.base.errors import ConfigError
from moetrain.model.blocks import RoutedBlock
from moetrain.model.config import ModelConfig, ShortcutConfig
from moetrain.model.context import ForwardContext
from moetrain.model.dispatch import Counts, LocalDispatcher, Ticket
from moetrain.model.gpt import GPT
from moetrain.model.schedule import Schedule
from moetrain.model.shapes import parameter_shapes
from moetrain.routing.config import RoutingConfig
from moetrain.routing.types import Routing
from tests.unit.plain_model import Plain
from tests.unit.test_model import build, gradients, tiny, tokens

TOP_1 = RoutingConfig(num_experts=4, top_k=1)


def pairs(kind: str, *positions: int, **changes: object) -> ModelConfig:
    return tiny(kind, shortcut=ShortcutConfig(list(positions)), **changes)


CASES = {
    "moe": tiny("moe"),
    "shared": tiny("shared"),
    "shared, cg2": tiny("shared", shared_gate="cg2"),
    "shortcut": tiny("shortcut"),
    "shortcut, cg2, two shared": tiny("shortcut", shared_gate="cg2", num_shared_experts=2),
    "scmoe 1": pairs("scmoe", 1),
    "scmoe 2": pairs("scmoe", 2),
    "scmoe 3": pairs("scmoe", 3),
    "scmoe 1 then 2, top-1": pairs("scmoe", 1, 2, routing=TOP_1),
    "scmoe, direct add": pairs("scmoe", 2, shared_gate="add"),
    "scmoe, cg2": pairs("scmoe", 2, shared_gate="cg2"),
    "dgmoe 1": pairs("dgmoe", 1, routing=TOP_1),
    "dgmoe 2": pairs("dgmoe", 2),
    "dgmoe 3": pairs("dgmoe", 3, routing=TOP_1),
    "dgmoe, free": tiny("dgmoe", shortcut=ShortcutConfig(distinct=False)),
    "dgmoe, shared bank": tiny("dgmoe", shortcut=ShortcutConfig(pairs_per_bank=2)),
}
KINDS = ["moe", "shared", "shortcut", "scmoe 1", "scmoe 2", "scmoe 3", "dgmoe 2", "dgmoe, shared bank"]


def routed_blocks(model: GPT) -> list[RoutedBlock]:
    return [block for block in model.blocks if isinstance(block, RoutedBlock)]


def computed(model: GPT, schedule: Schedule | None = None, context: ForwardContext | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and the gradient of every parameter, with the schedule in every block."""
    for block in routed_blocks(model):
        block.schedule = schedule or Schedule.default(len(block.operators))
    output = model(tokens(), context)
    return output.logits_BSV.detach(), gradients(model, output)


def distance(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Largest difference of two gradients, relative to the second's norm."""
    return max(float((mine[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs)


def one_vector(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"all": torch.cat([gradient.flatten() for gradient in gradients.values()])}


def same_bits(mine: tuple[Tensor, dict[str, Tensor]], theirs: tuple[Tensor, dict[str, Tensor]]) -> bool:
    return torch.equal(mine[0], theirs[0]) and all(torch.equal(mine[1][name], theirs[1][name]) for name in theirs[1])


@pytest.mark.parametrize("name", CASES)
def test_a_block_equals_its_equations(name: str) -> None:
    """Values, balance loss and every gradient, against loops over tokens, heads and experts."""
    model = build(CASES[name])
    plain = Plain(CASES[name], dict(model.named_parameters()))
    logits, mine = computed(model)
    expected = plain.logits(tokens())
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    weight = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view_as(expected)
    loss = (expected * weight).sum() + sum(torch.stack(losses).mean() for losses in plain.auxiliary.values())
    theirs = dict(zip(mine, torch.autograd.grad(loss, list(plain.values.values())), strict=True))
    assert distance(mine, theirs) < 1e-10


@pytest.mark.parametrize("kind", ["moe", "shared", "shortcut", "scmoe", "dgmoe"])
def test_choosing_all_experts_is_the_dense_mixture(kind: str) -> None:
    config = tiny(kind, routing=RoutingConfig(num_experts=4, top_k=4), shortcut=ShortcutConfig(distinct=kind != "dgmoe"))
    model = build(config)

    class Dense(Plain):
        def routed(self, moe: str, x_BSD: Tensor, taken: list[set[int]] | None) -> tuple[Tensor, list[set[int]]]:
            probability = torch.softmax(x_BSD @ self.values[f"{moe}.router.weight"].T, -1)
            outputs = torch.stack([self.expert(moe, expert, x_BSD) for expert in range(4)], -1)
            return (outputs * probability.unsqueeze(-2)).sum(-1), []

    expected = Dense(config, dict(model.named_parameters())).logits(tokens())
    torch.testing.assert_close(model(tokens()).logits_BSV, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_chunks", [1, 3])
@pytest.mark.parametrize("name", KINDS)
def test_every_slot_computes_the_same_bits(name: str, num_chunks: int) -> None:
    model = build(CASES[name])
    every = Schedule.every(len(routed_blocks(model)[0].operators), num_chunks)
    first, *others = (computed(model, schedule) for schedule in every)
    assert all(same_bits(other, first) for other in others)


@pytest.mark.parametrize("name", KINDS)
def test_chunks_change_rounding_only(name: str) -> None:
    """In float32 a tensor's gradient differs from that of one chunk by what either differs from float64: up to 1.5e-6, by processor."""
    exact, model = build(CASES[name]), build(CASES[name]).float()
    last = len(routed_blocks(model)[0].operators) + 1
    whole, whole_32 = computed(exact, Schedule((last,))), computed(model, Schedule((last,)))
    for num_chunks in (2, 4, 7):
        logits, mine = computed(exact, Schedule((last,) * num_chunks))
        assert float((logits - whole[0]).norm() / whole[0].norm()) < 1e-12
        assert distance(mine, whole[1]) < 1e-12
        logits, mine = computed(model, Schedule((last,) * num_chunks))
        assert float((logits - whole_32[0]).norm() / whole_32[0].norm()) < 1e-6
        assert distance(one_vector(mine), one_vector(whole_32[1])) < 1e-6
        assert distance(mine, whole[1]) < 2 * distance(whole_32[1], whole[1])


@pytest.mark.parametrize("name", KINDS)
def test_more_chunks_than_tokens_leave_some_empty(name: str) -> None:
    model = build(CASES[name])
    one = tokens()[:1, :1]
    whole = model(one).logits_BSV
    for block in routed_blocks(model):
        block.schedule = Schedule((1,) * 5)
    torch.testing.assert_close(model(one).logits_BSV, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", KINDS)
def test_slots_and_recomputation_change_no_bit_under_autocast(name: str) -> None:
    model = build(CASES[name]).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first, *others = (
            computed(model, schedule, ForwardContext(recompute=recompute))
            for schedule in Schedule.every(len(routed_blocks(model)[0].operators), 2)
            for recompute in (False, True)
        )
    assert all(same_bits(other, first) for other in others)


class Counting(LocalDispatcher):
    """Writes down what is called, in order."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def announce(self, routings: Sequence[Routing]) -> Sequence[Counts]:
        self.calls.append("announce")
        return super().announce(routings)

    def send(self, x_ND: Tensor, routing: Routing, counts: Counts) -> Ticket:
        self.calls.append("send")
        return super().send(x_ND, routing, counts)

    def send_back(self, rows_RD: Tensor, ticket: Ticket) -> Ticket:
        self.calls.append("send_back")
        return super().send_back(rows_RD, ticket)

    def combine(self, ticket: Ticket) -> Tensor:
        self.calls.append("combine")
        return super().combine(ticket)


def counted(model: GPT) -> Counting:
    """One dispatcher that counts, in all blocks."""
    dispatcher = Counting()
    for block in routed_blocks(model):
        block.moe.dispatcher = dispatcher
    return dispatcher


@pytest.mark.parametrize(("name", "gatings"), [("moe", 4), ("shared", 4), ("shortcut", 4), ("scmoe 2", 2), ("dgmoe, shared bank", 4)])
def test_recomputation_routes_and_sends_nothing_twice(name: str, gatings: int) -> None:
    model = build(CASES[name])
    plain = model(tokens()).stats
    dispatcher = counted(model)
    for block in routed_blocks(model):
        block.schedule = Schedule((1, 1, 1))
    output = model(tokens(), ForwardContext(recompute=True))
    gradients(model, output)
    assert {call: dispatcher.calls.count(call) for call in set(dispatcher.calls)} == {
        "announce": gatings, "send": 3 * gatings, "send_back": 3 * gatings, "combine": 3 * gatings
    }  # fmt: skip
    assert all(torch.equal(mine.load_E, theirs.load_E) for mine, theirs in zip(output.stats, plain, strict=True))
    num_pairs = sum(int(stats.load_E.sum()) for stats in output.stats)
    assert num_pairs == gatings * tokens().numel() * CASES[name].routing.top_k


def test_experts_run_just_before_the_computation_of_their_slot() -> None:
    model = build(tiny("scmoe", num_layers=2))
    seen: list[str] = []

    def noted(name: str, operator: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        seen.append(name.removeprefix("blocks.0.moe.experts/"))
        return operator(*inputs)

    (block,) = routed_blocks(model)
    block.schedule = Schedule((2, 3, 4))
    timed = model(tokens(), ForwardContext(timer=noted)).logits_BSV
    assert seen == ["dense_attention", "mlp", "experts", "attention", "experts", "shared", "experts", "head"]
    assert block.operators == ("mlp", "attention", "shared")
    assert torch.equal(timed, model(tokens()).logits_BSV)


def test_chunks_of_a_plain_block_are_all_sent_before_the_first_is_computed() -> None:
    """Pipelining as in Tutel: the second chunk travels while the first is computed."""
    model = build(tiny("moe", num_layers=1))
    dispatcher = counted(model)
    routed_blocks(model)[0].schedule = Schedule((1, 1))
    model(tokens())
    assert dispatcher.calls == ["announce", "send", "send", "send_back", "send_back", "combine", "combine"]


@pytest.mark.parametrize(("kind", "position", "operators"), [
    ("scmoe", 1, ("attention", "shared")),
    ("scmoe", 3, ("dense_attention", "mlp", "attention", "shared")),
    ("dgmoe", 2, ("mlp", "attention")),
])  # fmt: skip
def test_the_position_says_what_may_hide_the_exchange(kind: str, position: int, operators: tuple[str, ...]) -> None:
    (block,) = routed_blocks(GPT(pairs(kind, position, num_layers=2)))
    assert block.operators == operators
    assert block.schedule == Schedule((len(operators),))


def test_a_slot_that_a_block_does_not_have_is_no_slot() -> None:
    model = build(tiny("moe"))
    routed_blocks(model)[0].schedule = Schedule((2,))
    with pytest.raises(AssertionError, match="no slot 2"):
        model(tokens())
    for slots in ((), (0,), (2, 1)):
        with pytest.raises(AssertionError):
            Schedule(slots)


def test_dgmoe_tokens_never_choose_an_expert_twice_and_do_when_free() -> None:
    def clashes(config: ModelConfig) -> int:
        plain = Plain(config, dict(build(config).named_parameters()))
        plain.logits(tokens())
        first, second = plain.choices
        return sum(bool(mine & theirs) for mine, theirs in zip(first, second, strict=True))

    config = tiny("dgmoe", num_layers=2, routing=TOP_1)
    assert clashes(config) == 0
    assert clashes(replace(config, shortcut=ShortcutConfig(distinct=False))) > 10


def test_a_bank_under_two_pairs_is_one_module() -> None:
    config = CASES["dgmoe, shared bank"]
    model = build(config)
    first, second = routed_blocks(model)
    assert first.moe is second.moe
    assert config.banks() == ["blocks.0.moe.experts"]
    assert [name for name, _ in model.named_parameters() if "moe" in name] == [f"blocks.0.moe.{name}" for name in (
        "norm.weight", "router.weight", "experts.gate_up_proj", "experts.down_proj")]  # fmt: skip
    assert model.state_dict().keys() == parameter_shapes(config).keys()
    (stats,) = model(tokens()).stats
    assert int(stats.load_E.sum()) == 4 * tokens().numel() * config.routing.top_k


def test_shared_experts_are_one_wide_one() -> None:
    wide, one = (build(tiny("shared", num_layers=1, shared_gate="add", num_shared_experts=number)) for number in (3, 1))
    x = torch.randn(7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (block,), (single,) = routed_blocks(wide), routed_blocks(one)
    gate, up = block.moe.shared.gate_up_proj.weight.chunk(2)
    expected = torch.zeros_like(x)
    for g, u, d in zip(gate.split(12), up.split(12), block.moe.shared.down_proj.weight.split(12, 1), strict=True):
        with torch.no_grad():
            single.moe.shared.gate_up_proj.weight.copy_(torch.cat([g, u]))
            single.moe.shared.down_proj.weight.copy_(d)
        expected += single.moe.shared(x)
    torch.testing.assert_close(block.moe.shared(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kind", "changes", "words"), [
    ("scmoe", {"shortcut": ShortcutConfig([4])}, "model.shortcut.positions"),
    ("scmoe", {"shortcut": ShortcutConfig([])}, "model.shortcut.positions"),
    ("scmoe", {"shortcut": ShortcutConfig([1, 2, 3])}, "the model has 2 pairs"),
    ("moe", {"shortcut": ShortcutConfig([1])}, "the model has no pair"),
    ("scmoe", {"shortcut": ShortcutConfig(pairs_per_bank=2)}, "no dgmoe pair"),
    ("scmoe", {"shortcut": ShortcutConfig(distinct=False)}, "no dgmoe pair"),
    ("dgmoe", {"shortcut": ShortcutConfig(pairs_per_bank=0)}, "at least 1"),
    ("dgmoe", {"routing": RoutingConfig(num_experts=4, top_k=3)}, "shortcut.distinct=false"),
    ("scmoe", {"shared_gate": "cg3"}, "Did you mean"),
    ("shared", {"num_shared_experts": 0}, "must be positive"),
    ("moe", {"num_shared_experts": 2}, "model.num_shared_experts=2 is not possible: no block of the model has a shared expert"),
    ("dgmoe", {"shared_gate": "add"}, "Add shared or shortcut or scmoe to model.pattern"),
    ("dense", {"shared_gate": "cg2"}, "model.shared_gate='cg2'"),
])  # fmt: skip
def test_impossible_blocks_are_refused_with_their_key(kind: str, changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        tiny(kind, **changes)
    assert words in str(error.value)
