"""Training steps and generation of real shapes on one device: tokens/s, MFU, memory, and what the floor allows.

Models are those of the experiments in conf/, read without Hydra. Weights are the initial ones and tokens are random, so routing is that of
a young model. Used by tools/gpu_check.py.
"""

import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import yaml

from moetrain.base.clock import SystemClock
from moetrain.data.batch import Batch
from moetrain.dist.mesh import Mesh
from moetrain.dist.world import World
from moetrain.inference.config import SamplingParams
from moetrain.inference.language import Language
from moetrain.inference.runtime import Runtime
from moetrain.model.config import ModelConfig
from moetrain.model.count import count_parameters, training_flops_per_token
from moetrain.model.gpt import GPT
from moetrain.optim.config import OptimConfig
from moetrain.parallel.config import EngineConfig, ParallelConfig
from moetrain.parallel.native import TorchEngine
from moetrain.telemetry.meter import peak_memory_bytes
from moetrain.telemetry.probe import peak_flops
from tools.bench_experts import now

CONF = Path(__file__).resolve().parents[1] / "conf"
DEFAULT_MODEL = "small_scmoe"  # of conf/train.yaml
WARM_UP, MAX_STEPS = 3, 50
SEED = 0


@dataclass(frozen=True)
class Case:
    """One step: `accumulation` forwards of `sequences` of `seq_len` tokens."""

    sequences: int
    seq_len: int
    accumulation: int


CASES = {
    "gpt_moe_8e": Case(12, 256, 1),
    "gpt_125m_8e": Case(8, 1024, 4),
}
VARIANTS = {
    "bfloat16": EngineConfig(autocast="bfloat16"),
    "bfloat16, experts in a loop": EngineConfig(autocast="bfloat16", experts="loop"),
    "bfloat16, recompute": EngineConfig(autocast="bfloat16", recompute=True),
    "float32": EngineConfig(autocast="off"),
}


def model_config(experiment: str) -> ModelConfig:
    """An experiment's model as Hydra composes it (a test compares): its options of conf/model and conf/routing, then its `model` keys."""
    chosen = read_yaml(CONF / "experiment" / f"{experiment}.yaml")
    options = {key: option for entry in chosen.get("defaults", []) for key, option in entry.items()}
    values = read_yaml(CONF / "model" / f"{options.get('override /model', DEFAULT_MODEL)}.yaml") | chosen.get("model", {})
    if routing := options.get("override /routing"):
        values["routing"] = values.get("routing", {}) | read_yaml(CONF / "routing" / f"{routing}.yaml")
    return ModelConfig.from_dict(values)


def read_yaml(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8")) or {}


def tiny(config: ModelConfig) -> ModelConfig:
    """The same blocks at toy size, for a test on a CPU."""
    attention = replace(config.attention, num_heads=2, num_kv_heads=1, head_dim=8)
    sizes = {"vocab_size": 61, "hidden_size": 16, "num_layers": 2, "ffn_size": 16, "expert_ffn_size": 16, "shared_ffn_size": 16}
    return replace(config, attention=attention, max_position=64, **sizes)


def random_batch(config: ModelConfig, case: Case, number: int) -> Batch:
    ids = torch.randint(0, config.vocab_size, (case.sequences, case.seq_len + 1), generator=torch.Generator().manual_seed(SEED + number))
    position = torch.arange(case.seq_len).repeat(case.sequences, 1)
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.ones_like(position, dtype=torch.bool), position, None)


def train(name: str, config: ModelConfig, case: Case, variant: EngineConfig, device: torch.device, seconds: float) -> dict[str, object]:
    """Steps on one batch again and again, which a working step must learn, for about `seconds`."""
    world = World.single(device)
    engine = TorchEngine(config, ParallelConfig(ep=1), variant, OptimConfig(), world, Mesh(world, 1))
    engine.initialize(SEED)
    batches = [random_batch(config, case, number) for number in range(case.accumulation)]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    losses, times, deadline = list[float](), list[float](), time.monotonic() + seconds
    while len(times) < WARM_UP + 2 or (time.monotonic() < deadline and len(times) < WARM_UP + MAX_STEPS):
        start = now(device)
        losses.append(engine.step(batches, 1e-3, lambda: None).loss)
        times.append(now(device) - start)
    if not losses[-1] < losses[0]:
        raise RuntimeError(f"{name}: the loss went from {losses[0]:.4f} to {losses[-1]:.4f} on a batch seen {len(losses)} times")
    step_seconds = statistics.median(times[WARM_UP:])
    rate = case.sequences * case.seq_len * case.accumulation / step_seconds
    dtype = engine.autocast or torch.float32
    flops = rate * training_flops_per_token(config, case.seq_len)
    return {
        "steps": len(times) - WARM_UP,
        "step_seconds": step_seconds,
        "tokens_per_second": rate,
        "mfu": flops / peak_flops(device, dtype, SystemClock()),
        "peak_memory_bytes": peak_memory_bytes(device)(),
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def training(device: torch.device, seconds: float, quick: bool) -> dict[str, object]:
    """Every case in every variant; the first loss of a case must be the same in all of them, up to bfloat16."""
    results: dict[str, object] = {}
    for name, case in CASES.items():
        config = model_config(name)
        if quick:
            config, case = tiny(config), Case(2, 16, case.accumulation)
        found = {}
        for variant, engine in VARIANTS.items():
            found[variant] = train(name, config, case, engine, device, seconds / len(CASES) / len(VARIANTS))
            numbers = {key: f"{value:.4g}" for key, value in found[variant].items()}
            print(f"{name:12} {variant:28} " + ", ".join(f"{key} {value}" for key, value in numbers.items()), flush=True)
        first = [result["first_loss"] for result in found.values()]
        if max(first) - min(first) > 0.02 * min(first):
            raise RuntimeError(f"{name}: the first losses differ by more than bfloat16 explains: {first}")
        results[name] = {"case": asdict(case), "variants": found}
    return results | {"seed": SEED}


def filled(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> GPT:
    """Random weights, large enough for choices to differ."""
    model = GPT(config).to(device, dtype).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(SEED)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        noise = torch.randn(tensor.shape, generator=generator, device=device) * config.init_std * 2
        tensor.copy_(1 + noise if name.endswith("norm.weight") else noise)
    return model


def decode(model: GPT, prompts: list[list[int]], num_tokens: int) -> tuple[list[list[int]], float]:
    """Greedy tokens of all prompts together, and seconds of the steps after every prompt was read."""
    device = model.embedding.weight.device
    with Runtime(model, Language(None, ()), max_batch=len(prompts)) as runtime:
        handles = [runtime.submit(prompt, SamplingParams(num_tokens, temperature=0)) for prompt in prompts]
        drawn: dict[int, list[int]] = {handle: [] for handle in handles}
        start, counted = now(device), 0
        while not runtime.idle:
            if all(drawn.values()) and not counted:
                start, counted = now(device), sum(map(len, drawn.values()))
            for event in runtime.step():
                drawn[event.handle].append(event.token)
        seconds = now(device) - start
    made = sum(map(len, drawn.values())) - counted
    return list(drawn.values()), seconds / max(made, 1)


def check_decoding(config: ModelConfig, device: torch.device, prompt: list[int]) -> None:
    """In float64 the cache changes no token. Raises RuntimeError."""
    model = filled(config, torch.float64, device)
    ((drawn,), _) = decode(model, [prompt], 6)
    text = list(prompt)
    for _ in range(6):
        text.append(int(model(torch.tensor([text], device=device)).logits_BSV[0, -1].argmax()))
    if text[len(prompt) :] != drawn:
        raise RuntimeError(f"greedy decoding from the cache gives {drawn}, without it {text[len(prompt) :]}")


def floor_seconds(config: ModelConfig, batch: int, item: int, bytes_per_second: float) -> float:
    """Seconds of one decoding step that only reads each weight it needs once; experts by the expected number touched."""
    count = count_parameters(config)
    share = 1 - (1 - config.routing.top_k / config.routing.num_experts) ** batch
    return item * (count.dense + share * count.expert) / bytes_per_second


def generation(device: torch.device, bytes_per_second: float, quick: bool) -> dict[str, object]:
    """Decoding speed at several batch sizes, and the floor that memory sets."""
    prompt_size, num_tokens, batches = (4, 4, (1, 2)) if quick else (64, 128, (1, 4, 16))
    results: dict[str, object] = {}
    for name in CASES:
        config = tiny(model_config(name)) if quick else model_config(name)
        generator = torch.Generator().manual_seed(SEED)
        prompts = torch.randint(0, config.vocab_size, (max(batches), prompt_size), generator=generator).tolist()
        check_decoding(config, device, prompts[0])
        found = []
        for dtype in (torch.float32, torch.bfloat16):
            model = filled(config, dtype, device)
            decode(model, prompts[:1], 4)
            for batch in batches:
                _, per_token = decode(model, prompts[:batch], num_tokens)
                floor = floor_seconds(config, batch, dtype.itemsize, bytes_per_second) / batch
                dtype_name = str(dtype).removeprefix("torch.")
                found.append({"dtype": dtype_name, "batch": batch, "tokens_per_second": 1 / per_token, "over_floor": per_token / floor})
                print(
                    f"{name:12} {dtype_name:9} batch {batch:2}: {1 / per_token:9,.1f} tokens/s, {per_token / floor:,.1f} x floor",
                    flush=True,
                )
        results[name] = found
    return results | {"seed": SEED, "prompt_tokens": prompt_size, "new_tokens": num_tokens}
