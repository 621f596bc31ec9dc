"""How a run is spread over ranks and stepped, as configuration. No torch."""

from dataclasses import dataclass, field


@dataclass
class OverlapConfig:
    """When the experts of a block run beside its main stream (docs/overlap.md). Slots change no bit of a step, chunks do by rounding."""

    slot: int = 0  # experts run before main-stream computation `slot` (after the last of a block that has fewer); 0 = by measured times
    chunks: int = 1  # token chunks, computed one while another travels; 0 = by measured times (then reruns differ by rounding)
    max_chunks: int = 4  # the most of them where their number is chosen
    measure_every: int = 500  # steps between measurements, in whose steps no exchange overlaps; 0 = once, and again only after changes
    tolerance: float = 0.1  # measure again when the share of a step that is spent waiting for exchanges has changed by more; 0: never


@dataclass
class ParallelConfig:
    """Axes. `ep` borrows ranks from data parallelism: world = dp = edp * ep. 0 means auto."""

    ep: int = 0  # expert-parallel ranks; divides the world; auto = the largest divisor of the world <= num_experts
    dense: str = "replicate"  # dense parameters: replicate | fsdp (FSDP2 over all ranks; experts over their edp ranks)
    placement_seed: int | None = None  # a random permutation of experts over ranks; null = contiguous
    wire_dtype: str = "auto"  # of rows to experts and back: same (as computed) | bfloat16 | auto: bfloat16 where experts compute in it
    reduce_gradients: str = "auto"  # over ranks that hold copies: after (the backward) | auto: on gloo during it, between exchanges
    check_order: bool = True  # before the first step: all ranks must be about to make the same collective calls, or the job ends
    overlap: OverlapConfig = field(default_factory=OverlapConfig)
    timeout_seconds: float = 120.0  # a collective that takes longer ends the job, naming rank and operation
    heartbeat_seconds: float = 8.0  # a rank that is not heard from for so long (killed, frozen, cut off) ends the job; 0 = never


@dataclass
class EngineConfig:
    """How one step is computed."""

    name: str = "torch"  # torch (native PyTorch): the only one today
    dtype: str = "float32"  # of parameters and optimizer: float32 | float64
    autocast: str = "auto"  # matmuls in bfloat16: auto (where the hardware has it) | bfloat16 | off
    experts: str = "auto"  # grouped matmul: auto (measured order, see docs/model.md) | loop | bmm | grouped_mm
    recompute: bool = False  # activation checkpointing of attention, MLP and experts; routing and exchanges are saved
    compile: bool = False  # torch.compile of attention and MLP
