"""What a run costs before it starts: axes, batch, memory, traffic and checkpoint bytes of one rank. Pure arithmetic, no torch.

Parameters, traffic and checkpoint bytes are exact under a balanced gate. Activations and copies are estimates of what autograd
keeps; fragmentation and the allocator's reserve are not in them.
"""

from dataclasses import dataclass
from math import ceil, prod

from moetrain.base.errors import ConfigError, PlanError
from moetrain.model.config import ModelConfig
from moetrain.model.count import ParameterCount, count_parameters, training_flops_per_token
from moetrain.model.kinds import KINDS
from moetrain.model.shapes import is_expert, parameter_shapes
from moetrain.parallel.config import EngineConfig, ParallelConfig
from moetrain.store.manifest import WEIGHT16

VALUE_BYTES = {"float32": 4, "float64": 8}
STEP_BYTES = 8
COMPONENTS = ("master", "m", "v", "step")  # as in model/state.py, which needs torch
AUTO_MICRO_BATCH = 8


@dataclass(frozen=True)
class Axes:
    """world = dp = edp * ep."""

    world: int
    ep: int

    @property
    def dp(self) -> int:
        return self.world

    @property
    def edp(self) -> int:
        return self.world // self.ep


@dataclass(frozen=True)
class Batch:
    """sequences = world * micro_batch_size * accumulation."""

    sequences: int  # of the global batch
    seq_len: int
    micro_batch_size: int  # sequences per rank and forward
    accumulation: int  # forwards per rank and step

    @property
    def tokens(self) -> int:
        return self.sequences * self.seq_len


@dataclass(frozen=True)
class Saving:
    """What decides the size of checkpoints."""

    always_written: frozenset[str]  # components (master, m, v, step, weight16) of an expert that are written although it was not selected
    experts_per_save: int
    full_every: int
    keep: int


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest rank at the peak of a step."""

    weights: int
    gradients: int
    optimizer: int
    gathered: int  # FSDP2: whole parameters in flight
    copies: int  # autocast: weights in bfloat16
    activations: int
    logits: int
    exchange: int  # rows under way in one layer

    @property
    def total(self) -> int:
        parts = self.weights, self.gradients, self.optimizer, self.gathered, self.copies, self.activations, self.logits, self.exchange
        return sum(parts)


@dataclass(frozen=True)
class CheckpointSize:
    """Bytes of master, m, v and step; shares are balanced, so a rank writes its part of the world."""

    full: int
    partial: int  # equal to `full` where unselected experts are written too
    full_per_rank: int
    partial_per_rank: int
    stored: int  # at most, with `keep` recovery points and the older experts they refer to


@dataclass(frozen=True)
class Plan:
    axes: Axes
    batch: Batch
    num_steps: int
    parameters: ParameterCount
    experts_per_rank: tuple[int, int]  # fewest and most per bank
    training_flops_per_token: float
    memory: Memory
    all_to_all_bytes: int  # sent to other ranks per rank and step, forward and backward
    checkpoint: CheckpointSize
    activation_dtype: str
    notes: tuple[str, ...] = ()  # why the run cannot start like this


def axes(model: ModelConfig, parallel: ParallelConfig, world: int) -> Axes:
    """Resolves parallel.ep=0. Raises ConfigError or PlanError when there are no such axes."""
    if world < 1:
        raise PlanError(f"There is no world of {world} ranks.", "Use debug.world=1 or more.")
    num_experts = model.routing.num_experts if model.banks() else 1
    if parallel.ep == 0:
        return Axes(world, max(ep for ep in divisors(world) if ep <= num_experts))
    possible = ", ".join(str(ep) for ep in divisors(world) if ep <= num_experts)
    hint = f"Possible: {possible}, or 0 for auto."
    if parallel.ep < 0 or world % parallel.ep:
        raise ConfigError.of("parallel.ep", parallel.ep, f"it must divide the world of {world}", hint)
    if parallel.ep > num_experts:
        owned = f"model.routing.num_experts={num_experts}" if model.banks() else "a model without routed experts"
        raise ConfigError.of("parallel.ep", parallel.ep, f"{owned} leaves ranks without an expert", hint)
    return Axes(world, parallel.ep)


def split_batch(global_batch_tokens: int, seq_len: int, micro_batch_size: int, accumulation: int, world: int) -> Batch:
    """Re-derives what is 0 (micro-batch, accumulation) from the global batch. Raises ConfigError when it does not come out even."""
    key = "train.global_batch_tokens"
    if global_batch_tokens < 1 or global_batch_tokens % seq_len:
        near = max(1, round(global_batch_tokens / seq_len)) * seq_len
        raise ConfigError.of(key, global_batch_tokens, f"it must be a positive multiple of data.seq_len={seq_len}", f"Use {near}.")
    sequences = global_batch_tokens // seq_len
    if sequences % world:
        near = ceil(sequences / world) * world * seq_len
        rule = f"its {sequences} sequences of {seq_len} tokens cannot be shared equally by {world} ranks"
        raise ConfigError.of(key, global_batch_tokens, rule, f"Use {near}, or a number of ranks that divides {sequences}.")
    per_rank = sequences // world
    if micro_batch_size and accumulation and micro_batch_size * accumulation != per_rank:
        rule = f"times train.micro_batch_size={micro_batch_size} it must be the {per_rank} sequences that a rank has per step"
        raise ConfigError.of("train.accumulation", accumulation, rule, "Use 0 to derive it.")
    given = ("micro_batch_size", micro_batch_size) if micro_batch_size else ("accumulation", accumulation)
    if given[1] and per_rank % given[1]:
        possible = ", ".join(str(n) for n in divisors(per_rank))
        rule = f"it must divide the {per_rank} sequences that a rank has per step"
        raise ConfigError.of(f"train.{given[0]}", given[1], rule, f"Possible: {possible}, or 0 for auto.")
    micro = micro_batch_size or (per_rank // accumulation if accumulation else max(n for n in divisors(per_rank) if n <= AUTO_MICRO_BATCH))
    return Batch(sequences, seq_len, micro, per_rank // micro)


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def make_plan(
    model: ModelConfig,
    parallel: ParallelConfig,
    engine: EngineConfig,
    axes: Axes,
    batch: Batch,
    saving: Saving,
    tokens: int,
    notes: tuple[str, ...] = (),
) -> Plan:
    """The plan of a checked configuration. `engine.autocast=auto` is planned as on a GPU: bfloat16."""
    count = count_parameters(model)
    num_experts = model.routing.num_experts if count.num_banks else 0
    low_precision = engine.dtype == "float32" and engine.autocast != "off"
    return Plan(
        axes=axes,
        batch=batch,
        num_steps=ceil(tokens / batch.tokens),
        parameters=count,
        experts_per_rank=(num_experts // axes.ep, ceil(num_experts / axes.ep)),
        training_flops_per_token=training_flops_per_token(model, batch.seq_len),
        memory=memory(model, parallel, engine, axes, batch, low_precision),
        all_to_all_bytes=all_to_all_bytes(model, axes, batch, wire_bytes(parallel, engine, low_precision), low_precision),
        checkpoint=checkpoint_size(model, VALUE_BYTES[engine.dtype], axes.world, saving),
        activation_dtype="bfloat16" if low_precision else engine.dtype,
        notes=notes,
    )


def wire_bytes(parallel: ParallelConfig, engine: EngineConfig, low_precision: bool) -> int:
    """Per value of a row on its way to an expert."""
    auto = 2 if low_precision else 8
    return min(VALUE_BYTES[engine.dtype], {"auto": auto, "same": 8, "bfloat16": 2}[parallel.wire_dtype])


def memory(model: ModelConfig, parallel: ParallelConfig, engine: EngineConfig, axes: Axes, batch: Batch, low_precision: bool) -> Memory:
    """Of the fullest rank: it holds ceil(E / ep) experts of every bank."""
    count, value = count_parameters(model), VALUE_BYTES[engine.dtype]
    local_experts = ceil(model.routing.num_experts / axes.ep)
    local_bank = local_experts * count.per_expert
    held = count.dense + count.num_banks * local_bank
    if parallel.dense == "fsdp" and axes.world > 1:
        # FSDP2 cuts along the leading axis: whole experts
        weights = ceil(count.dense / axes.dp) + count.num_banks * ceil(local_experts / axes.edp) * count.per_expert
        gathered = whole_in_flight(model, local_bank if axes.edp > 1 and count.num_banks else 0)
    else:
        weights, gathered = held, 0
    compute = 2 if low_precision else value
    micro_tokens = batch.micro_batch_size * batch.seq_len
    open_at_once = max(KINDS[block].gatings for block in model.blocks()) if axes.ep > 1 else 0
    rows = micro_tokens * open_at_once * model.routing.top_k * kept_share(model)
    return Memory(
        weights=weights * value,
        gradients=(held if batch.accumulation > 1 else weights) * value,  # FSDP2 reduces them in the last micro-batch only
        optimizer=2 * weights * value,
        gathered=gathered * value,
        copies=held * compute if low_precision else 0,
        activations=int(micro_tokens * activation_bytes_per_token(model, value, compute, engine.recompute)),
        logits=micro_tokens * model.vocab_size * compute,  # their gradient takes their place; a softmax of a part stands beside them
        exchange=int(2 * rows * model.hidden_size * value),  # a send and a receive buffer
    )


def whole_in_flight(model: ModelConfig, bank: int) -> int:
    """Values that FSDP2 holds gathered at once: embedding and head for the whole step, two blocks (one prefetched) and two banks."""
    shapes = {name: shape for name, shape in parameter_shapes(model).items() if not is_expert(name)}
    blocks = [sum(prod(s) for name, s in shapes.items() if name.startswith(f"blocks.{i}.")) for i in range(len(model.blocks()))]
    root = sum(prod(shape) for name, shape in shapes.items() if not name.startswith("blocks."))
    return root + 2 * max(blocks) + 2 * bank


def activation_bytes_per_token(model: ModelConfig, stream: int, compute: int, recompute: bool) -> float:
    """Bytes that autograd keeps per token of a micro-batch: `stream` bytes a value on the residual stream, `compute` inside sublayers.

    With recomputation a sublayer keeps its input only, and the largest one is rebuilt in the backward; exchanged rows are always kept.
    """
    attention, D, K = model.attention, model.hidden_size, model.routing.top_k * kept_share(model)
    heads = attention.head_dim * (attention.num_heads + attention.num_kv_heads)
    inside = {
        "attention": 3 * heads * compute + D * stream,  # q, k, v, rotated q and k, output of the heads; the normed input
        "mlp": 3 * model.ffn_size * compute + D * stream,  # gate and up, the product
        "experts": K * 3 * model.expert_ffn_size * compute,
        "shared": 3 * model.num_shared_experts * model.shared_ffn_size * compute + D * stream,
    }
    routed = D * stream + 2 * model.routing.num_experts * 4 + K * D * (stream + compute)  # input, logits and scores, rows in and results
    inside["dense_attention"] = inside["attention"]
    kinds = [KINDS[block] for block in model.blocks()]
    used = [name for kind in kinds for name in kind.stream + kind.gatings * ("experts",)]
    kept = len(used) * D * stream + model.num_gatings() * routed
    if recompute:
        return kept + max(inside[name] for name in used)
    return kept + sum(inside[name] for name in used)


def kept_share(model: ModelConfig) -> float:
    """Share of selected pairs that a balanced gate keeps under the capacity."""
    return min(1.0, model.routing.capacity_factor or 1.0)


def all_to_all_bytes(model: ModelConfig, axes: Axes, batch: Batch, stream: int, low_precision: bool) -> int:
    """Bytes one rank sends to others in a step: rows out (`stream` bytes a value) and back (expert precision), and both gradients."""
    tokens = batch.micro_batch_size * batch.accumulation * batch.seq_len
    rows = tokens * model.num_gatings() * model.routing.top_k * kept_share(model) * (axes.ep - 1) / axes.ep
    back = 2 if low_precision else stream
    return int(rows * model.hidden_size * 2 * (stream + back))


def checkpoint_size(model: ModelConfig, value: int, world: int, saving: Saving) -> CheckpointSize:
    """Bytes of one full and one partial checkpoint: K of E experts per bank and everything else (arXiv 2408.04307 section 3.1).

    Storage: `keep` times everything else. Of experts the oldest point refers to all; each later point adds what it writes.
    """
    count = count_parameters(model)
    names = [name for name in parameter_shapes(model) if not name.endswith("balance_bias")]
    num_leaves = {True: sum(is_expert(name) for name in names), False: sum(not is_expert(name) for name in names)}
    biases = count.num_banks * model.routing.num_experts * value if model.routing.bias_update_rate > 0 else 0
    others = _state_bytes(frozenset(COMPONENTS), count.dense, num_leaves[False], value) + biases
    num_experts = model.routing.num_experts if count.num_banks else 0
    selected = min(saving.experts_per_save, num_experts)
    layer_of_experts = count.num_banks * count.per_expert  # one expert of every bank
    whole = _state_bytes(frozenset(COMPONENTS), layer_of_experts, num_leaves[True], value)
    always = _state_bytes(saving.always_written, layer_of_experts, num_leaves[True], value)
    written = selected * whole + (num_experts - selected) * always
    full, partial = others + num_experts * whole, others + written
    later = saving.keep - 1
    later_full = ceil(later / saving.full_every) if saving.full_every else 0
    stored = saving.keep * others + (1 + later_full) * num_experts * whole + (later - later_full) * written
    return CheckpointSize(full, partial, ceil(full / world), ceil(partial / world), stored)


def _state_bytes(components: frozenset[str], num_values: int, num_leaves: int, value: int) -> int:
    """master, m and v are arrays of values, weight16 of bfloat16; step is one int64 per parameter."""
    of_value = {"step": 0, WEIGHT16: 2}
    of_leaf = {"step": STEP_BYTES}
    return sum(num_values * of_value.get(component, value) + num_leaves * of_leaf.get(component, 0) for component in components)
