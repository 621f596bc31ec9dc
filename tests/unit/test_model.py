"""The model in one process: against dense oracles, and invariances that must hold for every block."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu

from moetrain.base.errors import MoetrainError
from moetrain.model.config import AttentionConfig, ModelConfig, RopeConfig
from moetrain.model.context import ForwardContext
from moetrain.model.dispatch import LocalDispatcher, inverse, permute, spread
from moetrain.model.experts import Experts, Visit, grouped_swiglu
from moetrain.model.gpt import GPT, GPTOutput
from moetrain.model.init import initial
from moetrain.model.mlp import gated
from moetrain.model.norm import RMSNorm
from moetrain.model.rope import rotary, rotate
from moetrain.model.shapes import parameter_shapes
from moetrain.parallel.apply import apply_compile
from moetrain.routing.config import RoutingConfig
from moetrain.routing.scores import gate_scores
from moetrain.routing.select import TopK
from moetrain.routing.types import Routing, RoutingContext, RoutingStats

BLOCKS = ["dense", "moe", "shared", "shortcut", "scmoe", "dgmoe"]


def tiny(block: str = "scmoe", **changes: object) -> ModelConfig:
    config = ModelConfig(
        vocab_size=61, hidden_size=16, num_layers=4, pattern=[block], ffn_size=24, expert_ffn_size=20, shared_ffn_size=12, max_position=32,
        init_std=0.2, attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6), routing=RoutingConfig(num_experts=4, top_k=2),
    )  # fmt: skip
    for name, value in changes.items():
        setattr(config, name, value)
    config.check()
    return config


def build(config: ModelConfig, seed: int = 3, method: str = "auto") -> GPT:
    """A float64 model with its initial values."""
    model = GPT(config, experts_method=method).double()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if ".experts." in name:
                for expert in range(tensor.shape[0]):
                    tensor[expert] = initial(name, expert, tuple(tensor.shape[1:]), config, seed)
            else:
                tensor.copy_(initial(name, None, tuple(tensor.shape), config, seed))
    return model


def tokens(batch: int = 3, length: int = 10) -> Tensor:
    return torch.randint(0, 61, (batch, length), generator=torch.Generator().manual_seed(5))


def gradients(model: GPT, output: GPTOutput) -> dict[str, Tensor]:
    weight = torch.linspace(-1, 1, output.logits_BSV.numel(), dtype=torch.float64).view_as(output.logits_BSV)
    loss = (output.logits_BSV * weight).sum() + sum(stats.auxiliary for stats in output.stats)
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("block", BLOCKS)
def test_parameters_are_named_and_shaped_as_the_design_says(block: str) -> None:
    config = tiny(block, tie_embeddings=False)
    assert {name: tuple(p.shape) for name, p in GPT(config).named_parameters()} == parameter_shapes(config)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_sparse_experts_equal_the_dense_loop_over_all_experts(top_k: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9, 8, dtype=torch.float64, generator=generator)
    bank = Experts("bank", (0, 1, 2, 3), 8, 6).double()
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64, generator=generator))
    logits = torch.randn(9, 4, dtype=torch.float64, generator=generator)
    config = RoutingConfig(num_experts=4, top_k=top_k)
    routing = TopK(config).plan(gate_scores(logits, config), RoutingContext((1, 9)))
    dispatcher = LocalDispatcher()
    ticket = dispatcher.send(x, routing, *dispatcher.announce([routing]))
    got = dispatcher.combine(dispatcher.send_back(bank(*dispatcher.receive(ticket)), ticket))
    expected = torch.zeros_like(x)
    for token in range(9):
        for expert in torch.topk(logits[token], top_k).indices.tolist():
            gate, up = (bank.gate_up_proj[expert] @ x[token]).chunk(2)
            expected[token] += torch.softmax(logits[token], 0)[expert] * (bank.down_proj[expert] @ (silu(gate) * up))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["loop", "bmm", "grouped_mm"])
def test_calls_of_one_visit_share_a_copy_of_the_weights_under_autocast(method: str) -> None:
    generator = torch.Generator().manual_seed(5)
    bank = Experts("b", (0, 1), 16, 24, method)
    for parameter in bank.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    rows = torch.randn(3, 10, 16, generator=generator, requires_grad=True)
    gradients, kept = [], dict[int, int]()  # by address

    def pack(saved: torch.Tensor) -> torch.Tensor:
        if saved.dtype == torch.bfloat16 and saved.untyped_storage().nbytes() == 2 * bank.gate_up_proj.numel():
            kept[saved.untyped_storage().data_ptr()] = 1
        return saved

    for shares in (False, True):
        kept.clear()
        visit = Visit(len(rows))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved), torch.autocast("cpu", dtype=torch.bfloat16):
            outs = [bank(each, torch.tensor([7, 3]), visit.next(), shares) for each in rows]
            assert (len(kept) == 1) == shares
        loss = torch.stack([out.float().square().sum() for out in outs]).sum()
        gradients.append(torch.autograd.grad(loss, [*bank.parameters()]))
    assert all(torch.equal(own, shared) for own, shared in zip(*gradients, strict=True))


def plain_swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, -1)
    return silu(gate) * up


def plain_rotation(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    left, right = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat([-right, left], -1) * sin.to(x.dtype)


def plain_experts(rows: Tensor, gate_up: Tensor, down: Tensor, count_e: Tensor) -> Tensor:
    parts = zip(rows.split(count_e.tolist()), gate_up, down, strict=True)
    return torch.cat([linear(plain_swiglu(linear(part, first)), second) for part, first, second in parts])


def looped(rows: Tensor, gate_up: Tensor, down: Tensor, count_e: Tensor) -> Tensor:
    return grouped_swiglu(rows, count_e, gate_up, down, "loop")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, "autocast"])
def test_backward_passes_by_hand_have_the_bits_of_autograds(dtype: torch.dtype | str) -> None:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype if isinstance(dtype, torch.dtype) else torch.float32).requires_grad_()

    cos, sin = rotary(torch.arange(9).expand(2, 9), 16, RopeConfig())
    cases: list[tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]] = [
        (gated, plain_swiglu, [draw(3, 7, 10)]),
        (partial(rotate, cos=cos, sin=sin), partial(plain_rotation, cos=cos, sin=sin), [draw(2, 9, 4, 16).transpose(1, 2)]),
    ]
    for counts in ([30, 0, 17, 1], [0, 0, 0, 0]):
        count_e = torch.tensor(counts)
        inputs = [draw(sum(counts), 8), draw(4, 24, 8), draw(4, 8, 12)]
        cases.append((partial(looped, count_e=count_e), partial(plain_experts, count_e=count_e), inputs))
    for mine, plain, inputs in cases:
        found = []
        for way in (mine, plain):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "autocast"):
                out = way(*inputs)
            found.append((out, *torch.autograd.grad(out.float().square().sum(), inputs)))
        assert all(torch.equal(one, other) and one.dtype == other.dtype for one, other in zip(*found, strict=True))


def test_spread_and_permuted_rows_have_the_gradients_of_indexing() -> None:
    """Also of tokens that lost a pair, or all."""
    generator = torch.Generator().manual_seed(4)
    token_P = torch.tensor([0, 0, 2, 3, 3])
    order_P = torch.tensor([3, 0, 4, 1, 2])
    x, rows = (torch.randn(count, 3, dtype=torch.float64, generator=generator).requires_grad_() for count in (5, 5))
    weight = torch.randn(5, 3, dtype=torch.float64, generator=generator)
    nothing = torch.zeros((), dtype=torch.int64)
    stats = RoutingStats(nothing, nothing, nothing, nothing)
    routing = Routing(token_P, torch.zeros_like(token_P), None, torch.ones(5), torch.tensor([[5]]), stats)
    for mine, plain, inputs in (
        (spread(x, routing, order_P), x[token_P[order_P]], x),
        (permute(rows, order_P, inverse(order_P)), rows[order_P], rows),
    ):
        assert torch.equal(mine, plain)
        (one,), (other,) = (torch.autograd.grad((out * weight).sum(), inputs) for out in (mine, plain))
        torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-14)


def test_the_norm_and_its_gradients_are_torchs_to_rounding() -> None:
    generator = torch.Generator().manual_seed(3)
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        norm = RMSNorm(24, 1e-5).to(dtype)
        torch.nn.init.normal_(norm.weight, generator=generator)
        x = torch.randn(3, 5, 24, dtype=dtype, generator=generator, requires_grad=True)
        grad = torch.randn(3, 5, 24, dtype=dtype, generator=generator)
        mine, theirs = norm(x), rms_norm(x, (24,), norm.weight, 1e-5)
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
        with torch.autocast("cpu", dtype=torch.bfloat16):  # whatever it says
            found = torch.autograd.grad(mine, [x, norm.weight], grad)
        for one, other in zip(found, torch.autograd.grad(theirs, [x, norm.weight], grad), strict=True):
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.detach().abs().max()))


@pytest.mark.parametrize("method", ["bmm", "grouped_mm"])
@pytest.mark.parametrize("counts", [[3, 0, 5, 2], [0, 0, 0, 0], [10, 0, 0, 0]])
def test_grouped_matmul_methods_agree_with_the_loop(method: str, counts: list[int]) -> None:
    generator = torch.Generator().manual_seed(2)
    rows, gate_up, down = (torch.randn(shape, generator=generator) for shape in ((sum(counts), 8), (4, 24, 8), (4, 8, 12)))
    inputs = [t.requires_grad_() for t in (rows, gate_up, down)]
    results = []
    for each in ("loop", method):
        out = grouped_swiglu(rows, torch.tensor(counts), gate_up, down, each)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", BLOCKS)
def test_recomputation_changes_neither_gradients_nor_counts(block: str) -> None:
    model = build(tiny(block))
    plain, again = (model(tokens(), ForwardContext(recompute=flag)) for flag in (False, True))
    for mine, theirs in zip(plain.stats, again.stats, strict=True):
        assert torch.equal(mine.load_E, theirs.load_E)
    first, second = gradients(model, plain), gradients(model, again)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("block", BLOCKS)
def test_no_token_sees_the_future(block: str) -> None:
    model = build(tiny(block))
    ids = tokens()
    changed = ids.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 61
    torch.testing.assert_close(model(ids).logits_BSV[:, :7], model(changed).logits_BSV[:, :7], rtol=1e-12, atol=1e-12)


def test_document_boundaries_equal_separate_documents() -> None:
    model = build(tiny())
    ids = tokens(1, 10)
    context = ForwardContext(position_BS=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]]), document_BS=torch.tensor([[0] * 4 + [1] * 6]))
    together = model(ids, context).logits_BSV
    apart = torch.cat([model(ids[:, :4]).logits_BSV, model(ids[:, 4:]).logits_BSV], 1)
    torch.testing.assert_close(together, apart, rtol=1e-10, atol=1e-10)


def test_sliding_window_forgets_what_left_it() -> None:
    config = tiny("dense", num_layers=1)
    config.attention.sliding_window = 3
    model = build(config)
    ids = tokens(1, 10)
    changed = ids.clone()
    changed[0, 4] = (changed[0, 4] + 1) % 61
    same = model(ids).logits_BSV - model(changed).logits_BSV
    assert bool((same[0, 7:].abs() < 1e-12).all()) and bool((same[0, 4:7].abs().amax(1) > 1e-6).all())


def test_initial_values_depend_on_seed_name_and_expert_only() -> None:
    config = tiny()
    first, second = "blocks.0.moe.experts.down_proj", "blocks.1.moe.experts.down_proj"
    one = initial(first, 1, (16, 20), config, 1)
    assert torch.equal(one, initial(first, 1, (16, 20), config, 1))
    for name, expert, seed in ((second, 1, 1), (first, 2, 1), (first, 1, 2)):
        assert not torch.equal(one, initial(name, expert, (16, 20), config, seed))
    wide = initial("blocks.0.moe.experts.gate_up_proj", 1, (400, 160), config, 1)
    assert abs(float(wide.std()) - config.init_std) < 0.01
    narrow = initial("blocks.0.moe.experts.down_proj", 1, (160, 400), config, 1)
    assert abs(float(narrow.std()) - config.init_std / 8**0.5) < 0.005


def test_a_compiler_that_could_not_link_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(torch, "__file__", "/home/someone/my env/torch/__init__.py")
    with pytest.raises(MoetrainError, match=r"holds a space .*engine\.compile=false"):
        apply_compile(build(tiny()), torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.skipif(" " in torch.__file__, reason="torch.compile cannot link where torch's path holds a space; it is refused there")
@pytest.mark.parametrize("block", ["scmoe", "shortcut", "dgmoe"])
def test_compiled_sublayers_compute_the_same(block: str) -> None:
    plain, compiled = build(tiny(block)), build(tiny(block))
    apply_compile(compiled, torch.device("cpu"))
    mine, theirs = compiled(tokens()), plain(tokens())
    torch.testing.assert_close(mine.logits_BSV, theirs.logits_BSV, rtol=1e-10, atol=1e-10)
    expected = gradients(plain, theirs)
    for name, gradient in gradients(compiled, mine).items():
        assert float((gradient - expected[name]).norm()) <= 1e-10 * float(expected[name].norm()), name
