"""The CUDA twins: what runs on a GPU equals what the CPU computes. Skipped where there is no CUDA device.

TF32 is off (torch's default for matmuls), so float32 differs by the order of sums only.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moetrain.data.batch import Batch
from moetrain.dist.mesh import Mesh
from moetrain.dist.world import World
from moetrain.model.experts import grouped_swiglu
from moetrain.model.state import assemble
from moetrain.optim.config import OptimConfig
from moetrain.parallel.config import EngineConfig, ParallelConfig
from moetrain.parallel.native import TorchEngine
from tests.unit.test_model import BLOCKS, build, tiny, tokens

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def engine_on(device: str, block: str, dtype: str, **options: object) -> TorchEngine:
    config = tiny(block)
    config.routing = replace(config.routing, z_loss_weight=0.01, bias_update_rate=0.01, auxiliary_loss_scope="global_batch")
    world = World.single(torch.device(device))
    settings = EngineConfig(dtype=dtype, autocast="off", **options)  # type: ignore[arg-type]
    engine = TorchEngine(config, ParallelConfig(ep=1), settings, OptimConfig(grad_clip=0.5), world, Mesh(world, 1))
    engine.initialize(seed=2)
    return engine


def step_batches(step: int) -> list[Batch]:
    """Two micro-batches on the host, as the loader gives them; documents and invalid labels in the second."""
    generator = torch.Generator().manual_seed(step)
    batches = []
    for number in range(2):
        ids = torch.randint(0, 61, (3, 9), generator=generator)
        position = torch.arange(8).expand(3, 8).contiguous()
        valid = torch.rand(3, 8, generator=generator) < (1.0, 0.6)[number]
        document = (position >= 5).long() if number else None
        batches.append(Batch(ids[:, :-1], ids[:, 1:], valid, position, document))
    return batches


@pytest.mark.parametrize("block", BLOCKS)
def test_forward_and_backward_equal_the_host(block: str) -> None:
    results: list[list[Tensor]] = []
    for device in ("cpu", "cuda"):
        model = build(tiny(block)).float().to(device)
        output = model(tokens().to(device))
        loss = output.logits_BSV.float().logsumexp(-1).mean() + sum(stats.auxiliary for stats in output.stats) / 30
        results.append([output.logits_BSV, *torch.autograd.grad(loss, list(model.parameters()))])
    for on_host, on_device in zip(*results, strict=True):
        torch.testing.assert_close(on_device.cpu(), on_host, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["bmm", "grouped_mm"])
@pytest.mark.parametrize("counts", [[40, 0, 9, 79], [0, 0, 0, 0]])
def test_grouped_matmul_in_bfloat16_agrees_with_the_loop_in_float64(method: str, counts: list[int]) -> None:
    generator = torch.Generator().manual_seed(2)
    shapes = (sum(counts), 32), (4, 96, 32), (4, 32, 48)
    exact = [torch.randn(shape, generator=generator).bfloat16().double().requires_grad_() for shape in shapes]
    rounded = [x.detach().bfloat16().cuda().requires_grad_() for x in exact]
    outcomes = []
    for inputs, which in ((exact, "loop"), (rounded, method)):
        out = grouped_swiglu(inputs[0], torch.tensor(counts), inputs[1], inputs[2], which)
        pull = torch.ones(out.shape, dtype=out.dtype, device=out.device)
        outcomes.append([out, *torch.autograd.grad(out, inputs, pull)])
    for wanted, got in zip(*outcomes, strict=True):
        assert (got.double().cpu() - wanted).norm() <= 0.02 * wanted.norm() + 1e-12


def test_autocast_takes_the_grouped_matmul_and_trains() -> None:
    """bfloat16 matmuls: the loss follows the float32 one within their rounding."""
    losses = []
    for autocast in ("off", "bfloat16"):
        world = World.single(torch.device("cuda", 0))
        config = tiny("scmoe", hidden_size=32, ffn_size=32, expert_ffn_size=32, shared_ffn_size=32)
        settings = EngineConfig(autocast=autocast)
        engine = TorchEngine(config, ParallelConfig(ep=1), settings, OptimConfig(), world, Mesh(world, 1))
        engine.initialize(seed=2)
        losses.append([engine.step(step_batches(0), 1e-3, lambda: None).loss for _ in range(5)])
    assert losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
def test_steps_of_the_engine_equal_the_host(block: str, recompute: bool) -> None:
    engines = [engine_on(device, block, "float64", recompute=recompute) for device in ("cpu", "cuda")]
    for step in range(3):
        host, device = (engine.step(step_batches(step), 1e-2, lambda: None) for engine in engines)
        assert device.loss == pytest.approx(host.loss, rel=1e-6)  # rotary angles are float32 on both
        assert device.grad_norm == pytest.approx(host.grad_norm, rel=1e-6)
        assert torch.equal(device.load, host.load)
    on_host, on_device = (assemble(engine.state()) for engine in engines)
    for key, wanted in on_host.items():
        torch.testing.assert_close(on_device[key], wanted, rtol=1e-5, atol=1e-6)
    host, device = (engine.evaluate(step_batches(9)[1]) for engine in engines)
    assert device.num_tokens == host.num_tokens
    assert device.nats == pytest.approx(host.nats, rel=1e-6)


def test_a_checkpoint_of_device_tensors_is_of_its_moment_and_loads_on_both(tmp_path: Path) -> None:
    """The copy reads what was computed before the save, although the next step follows at once; then back to GPU and host."""
    pytest.importorskip("awscrt")
    from moetrain.base.clock import SystemClock
    from moetrain.checkpoint.checkpointer import Checkpointer
    from moetrain.checkpoint.config import CheckpointConfig
    from tests.unit.checkpoint_kit import LocalNode

    engine = engine_on("cuda", "scmoe", "float32")
    saver = Checkpointer(tmp_path, CheckpointConfig(), 0, 1, lambda value: value, SystemClock(), LocalNode())
    engine.step(step_batches(0), 1e-2, lambda: None)
    saved = {key: value.clone() for key, value in assemble(engine.state()).items()}
    saver.save(engine.state(), {"step": 1})
    engine.step(step_batches(1), 1e-2, saver.wait_copied)
    saver.finish()
    assert any(not torch.equal(value, saved[key]) for key, value in assemble(engine.state()).items())
    for device in ("cuda", "cpu"):
        fresh = engine_on(device, "scmoe", "float32")
        reader = Checkpointer(tmp_path, CheckpointConfig(), 0, 1, lambda value: value, SystemClock(), LocalNode())
        state = fresh.state()
        report = reader.load(state, "must")
        assert report is not None and report.step == 1
        fresh.load(state)
        for key, value in assemble(fresh.state()).items():
            assert torch.equal(value, saved[key]), key


@pytest.mark.parametrize("block", BLOCKS)
def test_greedy_completions_equal_the_host(block: str) -> None:
    from moetrain.inference.config import SamplingParams
    from moetrain.inference.language import Language
    from moetrain.inference.runtime import Runtime

    drawn: list[list[int]] = []
    for device in ("cpu", "cuda"):
        model = build(tiny(block)).eval().requires_grad_(False).to(device)
        with Runtime(model, Language(None, ())) as runtime:
            handles = [runtime.submit(tokens()[row, : 3 + row].tolist(), SamplingParams(12, temperature=0)) for row in range(3)]
            by_handle: dict[int, list[int]] = {handle: [] for handle in handles}
            while not runtime.idle:
                for event in runtime.step():
                    by_handle[event.handle].append(event.token)
        drawn += by_handle.values()
    assert drawn[:3] == drawn[3:]
    assert {len(tokens) for tokens in drawn} == {12}
