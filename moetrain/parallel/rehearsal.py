"""One step of a small twin of the model on a stage, to compare which collective calls every rank is about to make."""

import hashlib
from dataclasses import replace

import torch

from moetrain.data.batch import Batch
from moetrain.dist.mesh import Mesh
from moetrain.dist.order import Rehearsal, compare
from moetrain.model.config import ModelConfig
from moetrain.model.shapes import parameter_shapes
from moetrain.parallel.config import EngineConfig, ParallelConfig
from moetrain.parallel.native import TorchEngine
from moetrain.parallel.plan import Batch as Shape

WIDTH, TOKENS = 8, 16  # of the twin; the least that every block kind can be built with


def check_order(engine: TorchEngine, parallel: ParallelConfig, settings: EngineConfig, shape: Shape) -> None:
    """Raises TrainingError naming ranks, group and calls unless all ranks would make the same calls in one step of `engine`.

    No collective runs: digests are compared over the store. Does nothing on one rank, or without `parallel.check_order`.
    """
    if engine.world.size > 1 and parallel.check_order:
        compare(rehearse(engine, parallel, settings, shape), engine.world)


def rehearse(engine: TorchEngine, parallel: ParallelConfig, settings: EngineConfig, shape: Shape) -> Rehearsal:
    """One step of a twin with every block, bank and rule of the engine's model and the same axes, but small widths, on the CPU.

    At most two micro-batches: the last one's calls differ from the others'. The real widths and numbers are one line among the calls.
    """
    with torch.random.fork_rng(devices=[]), Rehearsal(engine.world) as stage:
        stage.note(facts(engine, parallel, settings, shape))
        plain = replace(settings, compile=False, autocast="off" if engine.autocast is None else "bfloat16")
        ep = engine.mesh.ep.size
        twin = TorchEngine(small(engine.config, ep), parallel, plain, engine.optim, stage, Mesh(stage, ep))
        twin.initialize(seed=0)
        twin.step([_batch()] * min(shape.accumulation, 2), 0.0, lambda: None)
    return stage


def facts(engine: TorchEngine, parallel: ParallelConfig, settings: EngineConfig, shape: Shape) -> str:
    """What decides a step's messages, and what goes into them, in a line: equal on ranks that can train together."""
    shapes = digest(sorted(parameter_shapes(engine.config).items()))
    rest = digest([engine.config, parallel, settings, engine.optim, engine.autocast])
    return (
        f"a step of {shape.accumulation} micro-batches of {shape.micro_batch_size} x {shape.seq_len} tokens on {engine.world.device.type}, "
        f"{settings.dtype} parameters of shapes {shapes}, settings {rest}"
    )


def digest(what: object) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()[:12]


def small(model: ModelConfig, ep: int) -> ModelConfig:
    """The same model with the least widths and experts: what decides which calls a step makes, not how long they take."""
    attention = replace(model.attention, num_heads=1, num_kv_heads=1, head_dim=WIDTH)
    num_experts = min(model.routing.num_experts, max(2 * ep, 2 * model.routing.top_k))
    return replace(
        model, vocab_size=TOKENS, hidden_size=WIDTH, ffn_size=WIDTH, expert_ffn_size=WIDTH, shared_ffn_size=WIDTH, max_position=TOKENS,
        attention=attention, routing=replace(model.routing, num_experts=num_experts),
    )  # fmt: skip


def _batch() -> Batch:
    tokens_BS = torch.arange(TOKENS).unsqueeze(0)
    return Batch(tokens_BS, tokens_BS, torch.ones_like(tokens_BS, dtype=torch.bool), tokens_BS, None)
