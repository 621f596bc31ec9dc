"""Bytes of one partial checkpoint, K = 1: by plan for the full shapes, on real files for the same shapes four times narrower.

    python -m tools.checkpoint_bytes --json benchmarks/checkpoint_bytes.json

The measure is a DCP full save of bfloat16 weights, float32 masters and two moments (14 B a parameter; 12 B without the weights). A
narrower shape has the same share of experts: every width and the vocabulary are divided alike. Its state goes through the
Checkpointer a run uses and through DCP's own writer; manifests count as files.
Who writes how much is computed for the full shapes with the division that saving uses, for every checkpoint of a whole rotation.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from moetrain.base.clock import SystemClock
from moetrain.checkpoint.checkpointer import Checkpointer
from moetrain.checkpoint.config import CheckpointConfig
from moetrain.checkpoint.ledger import Ledger
from moetrain.checkpoint.modes import ALWAYS_WRITTEN, Selection
from moetrain.checkpoint.plan import Holding, Part, holdings_of, merged, writes
from moetrain.checkpoint.recover import alone
from moetrain.checkpoint.turns import Horizon, Turns, homes_of
from moetrain.dist.mesh import Mesh
from moetrain.dist.world import World
from moetrain.model.config import ModelConfig
from moetrain.model.count import count_parameters
from moetrain.model.shapes import is_expert, parameter_shapes
from moetrain.model.state import ModelState
from moetrain.optim.config import OptimConfig
from moetrain.parallel.config import EngineConfig, ParallelConfig
from moetrain.parallel.fragments import shard_start
from moetrain.parallel.native import TorchEngine
from moetrain.parallel.plan import Saving, checkpoint_size
from moetrain.routing.placement import Placement
from moetrain.store.io import Io
from moetrain.store.manifest import WEIGHT16, Manifest, Piece, Tensor
from moetrain.store.objects import CheckpointFolder
from tools.bench_step import model_config

MODES = ("experts", "weights16", "moments", "full")
POINTS = 10
SEED = 0
AGREE = 0.01  # plan and files

# Shape -> mode -> largest share of 14 B a parameter that is asked for.
TARGETS = {
    "gpt_350m_16e": {"experts": 0.17, "weights16": 0.30, "moments": 0.40},
    "gpt_125m_8e_all": {"experts": 0.21, "moments": 0.43},
    "gpt_125m_8e": {},
}
TEN_POINTS = 2.6  # full sizes of 14 B a parameter; gpt_350m_16e, experts

# Ranks, ep, whether dense parameters are sharded (FSDP2). The first three are the paper's cases.
LAYOUTS = [(8, 8, False), (16, 16, False), (16, 8, False), (12, 6, False), (10, 5, False), (8, 8, True), (16, 8, True), (10, 5, True)]
BALANCED, OVER_BOUND = 1.05, 1.02  # heaviest rank over the mean; over what the shards force where that is more


def shapes() -> dict[str, ModelConfig]:
    """The two shapes of arXiv 2408.04307 and its first version's: an expert bank in every layer, 2048 positions."""
    small = model_config("gpt_125m_8e")
    return {
        "gpt_350m_16e": model_config("gpt_350m_16e"),
        "gpt_125m_8e_all": replace(small, pattern=["moe"], max_position=2048),
        "gpt_125m_8e": small,
    }


def narrower(model: ModelConfig, by: int) -> ModelConfig:
    """Every width and the vocabulary divided: all matrices have by^2 fewer values."""
    attention = replace(model.attention, head_dim=model.hidden_size // model.attention.num_heads // by)
    sizes = {name: round(getattr(model, name) / by) for name in ("vocab_size", "hidden_size", "ffn_size", "expert_ffn_size")}
    return replace(model, attention=attention, max_position=64, **sizes)


@dataclass(frozen=True)
class Sizes:
    """Bytes of a full and of a partial checkpoint, and of `POINTS` recovery points."""

    full: float
    partial: float
    stored: float


def planned(model: ModelConfig, mode: str) -> Sizes:
    size = checkpoint_size(model, 4, 1, Saving(ALWAYS_WRITTEN[mode], 1, 0, POINTS))
    return Sizes(size.full, size.partial, size.stored)


def random_state(model: ModelConfig) -> ModelState:
    """Live state of one rank as the engine shows it, every value random."""
    world = World.single()
    engine = TorchEngine(model, ParallelConfig(ep=1), EngineConfig(), OptimConfig(), world, Mesh(world, 1))
    engine.initialize(SEED)
    generator = torch.Generator().manual_seed(SEED)
    state = engine.state()
    with torch.no_grad():
        for fragment in state:
            if fragment.component in ("m", "v"):
                fragment.data.copy_(torch.rand(fragment.data.shape, generator=generator))
    return state


def measured(state: ModelState, mode: str, folder: Path) -> Sizes:
    """`POINTS` saves of a run; sizes of what they left on the disk."""
    config = CheckpointConfig(mode=mode, keep=POINTS, timeout_seconds=300)
    checkpointer = Checkpointer(folder, config, 0, 1, alone, SystemClock())
    sizes, before = list[int](), 0
    for step in range(1, POINTS + 1):
        checkpointer.save(state, {"step": step})
        checkpointer.finish()
        after = on_disk(folder)
        sizes.append(after - before)
        before = after
    points = [point for point in CheckpointFolder(folder, Io()).history() if isinstance(point, Manifest)]
    assert [point.full for point in points] == [mode == "full"] * (POINTS - 1) + [True]
    return Sizes(sizes[0], statistics.median(sizes[1:]), before)


def on_disk(folder: Path) -> int:
    """Objects and manifests; receipts go with the next sweep."""
    return sum(path.stat().st_size for part in ("objects", "manifests") for path in (folder / part).rglob("*") if path.is_file())


def dcp_bytes(state: ModelState, folder: Path, with_bfloat16: bool) -> int:
    """A full save by DCP's own writer: masters and moments, with or without bfloat16 weights; the experts of a bank stacked."""
    members: dict[str, list[torch.Tensor]] = {}
    for fragment in state:
        members.setdefault(f"{fragment.name}:{fragment.component}", []).append(fragment.data.detach())
    tensors = {key: torch.stack(parts) if len(parts) > 1 else parts[0] for key, parts in members.items()}
    if with_bfloat16:
        tensors |= {f"{key}:weight": data.bfloat16() for key, data in tensors.items() if key.endswith(":master")}
    state_dict_saver.save(tensors, storage_writer=FileSystemWriter(folder), no_dist=True)
    num_bytes = sum(path.stat().st_size for path in folder.iterdir())
    shutil.rmtree(folder)
    return num_bytes


def holdings(model: ModelConfig, world: int, ep: int, sharded: bool, mode: str) -> list[Holding]:
    """What all ranks hold, as the native engine places it."""
    return merged(holdings_of(parts_of_rank(model, world, ep, sharded, mode, rank)) for rank in range(world))


def parts_of_rank(model: ModelConfig, world: int, ep: int, sharded: bool, mode: str, rank: int) -> Iterator[Part]:
    placement = Placement.balanced(model.routing.num_experts, ep)
    ranks_of_copy = tuple(range(rank % ep, world, ep))
    for name, shape in parameter_shapes(model).items():
        if not is_expert(name):
            yield from dense_parts(name, shape, world, sharded, rank)
            continue
        mine = placement.experts[rank % ep]
        if sharded:
            copies, copy = world // ep, rank // ep
            mine = mine[shard_start(len(mine), copies, copy) : shard_start(len(mine), copies, copy + 1)]
        for expert in mine:
            for component in ("master", "m", "v", "step", *([WEIGHT16] if mode == "weights16" else [])):
                yield part(name, component, shape[1:], expert, (rank,) if sharded else ranks_of_copy)


def dense_parts(name: str, shape: tuple[int, ...], world: int, sharded: bool, rank: int) -> Iterator[Part]:
    rows = shard_start(shape[0], world, rank + 1) - shard_start(shape[0], world, rank)
    for component in ("master", "m", "v"):
        if not sharded:
            yield part(name, component, shape, None, tuple(range(world)))
        elif rows:
            yield part(name, component, (rows, *shape[1:]), None, (rank,))
    yield part(name, "step", (), None, tuple(range(world)))


def part(name: str, component: str, shape: tuple[int, ...], expert: int | None, holders: tuple[int, ...]) -> Part:
    shape = () if component == "step" else shape
    dtype = {"step": "int64", WEIGHT16: "bfloat16"}.get(component, "float32")
    bank = None if expert is None else name.rpartition(".")[0]
    return Part(Tensor(name, component, bank, expert, dtype, shape, (Piece((0,) * len(shape), shape, ""),)), holders)


@dataclass(frozen=True)
class Balance:
    """The heaviest rank of one checkpoint over the mean, and the least it could be, whoever divides: what the shards force."""

    over_mean: float
    bound_over_mean: float

    @property
    def ok(self) -> bool:
        return self.over_mean <= max(BALANCED, OVER_BOUND * self.bound_over_mean)


def balance(model: ModelConfig, world: int, ep: int, sharded: bool, mode: str) -> tuple[Balance, Balance]:
    """Of a full checkpoint, and the worst of the partial ones of a whole rotation."""
    held = holdings(model, world, ep, sharded, mode)
    banks = {bank: model.routing.num_experts for bank in model.banks()}
    turns, ledger = Turns(CheckpointConfig(mode=mode), Horizon(banks)), Ledger.of_banks(banks).after(None, mode)
    full, partial = divided(held, mode, None), []
    for index in range(1, model.routing.num_experts + 1):
        selection = turns.selection(index, ledger, homes=homes_of(held))
        ledger = ledger.after(selection, mode)
        partial.append(divided(held, mode, selection))
    return full, max(partial, key=lambda one: one.over_mean)


def divided(held: list[Holding], mode: str, selection: Selection | None) -> Balance:
    division = writes(held, mode, selection)
    return Balance(division.imbalance, division.bound * len(division.loads) / sum(division.loads.values()))


def compare(name: str, model: ModelConfig, by: int, folder: Path) -> dict[str, object]:
    """One shape in every mode: plan and files as shares of DCP's full save."""
    small = narrower(model, by)
    parameters, small_parameters = (count_parameters(shape).total for shape in (model, small))
    experts = [count_parameters(shape).expert / count_parameters(shape).total for shape in (model, small)]
    state = random_state(small)
    dcp = {bytes_each: dcp_bytes(state, folder / "dcp", bytes_each == 14) for bytes_each in (14, 12)}
    rows, ok = {}, True
    for mode in MODES:
        plan, files = planned(model, mode), measured(state, mode, folder / "run")
        shutil.rmtree(folder / "run")
        by_plan, by_files = plan.partial / (14 * parameters), files.partial / dcp[14]
        target = TARGETS[name].get(mode)
        row = {
            "plan_bytes": plan.partial,
            "plan_of_14": by_plan,
            "plan_of_12": plan.partial / (12 * parameters),
            "files_bytes": files.partial,
            "files_of_14": by_files,
            "files_of_12": files.partial / dcp[12],
            "files_over_plan": by_files / by_plan,
            "ten_points_of_14": plan.stored / (14 * parameters),
            "ten_points_of_14_files": files.stored / dcp[14],
            "ten_points_of_own_full": plan.stored / plan.full,
            "target_of_14": target,
        }
        ok = ok and abs(by_files / by_plan - 1) <= AGREE and (target is None or max(by_plan, by_files) <= target)
        rows[mode] = row
        asked = f"asked {target:.0%}" if target else ""
        print(
            f"{name:16} {mode:10} plan {by_plan:6.2%} of 14 B, {row['plan_of_12']:6.2%} of 12 B"
            f"   files {by_files:6.2%}, {row['files_of_12']:6.2%}   files/plan {by_files / by_plan:.4f}"
            f"   ten points {row['ten_points_of_14']:.3f} fulls of 14 B, files {row['ten_points_of_14_files']:.3f}   {asked}",
            flush=True,
        )
    if name == "gpt_350m_16e":
        ten = rows["experts"]
        ok = ok and max(ten["ten_points_of_14"], ten["ten_points_of_14_files"]) <= TEN_POINTS
    return {
        "parameters": parameters, "narrower_by": by, "narrower_parameters": small_parameters, "expert_share": experts[0],
        "narrower_expert_share": experts[1], "dcp_bytes_14": dcp[14], "dcp_bytes_12": dcp[12], "modes": rows, "ok": ok,
    }  # fmt: skip


def divisions(name: str, model: ModelConfig) -> list[dict[str, object]]:
    """Every layout and mode."""
    rows = []
    for world, ep, sharded in LAYOUTS:
        if ep > model.routing.num_experts:
            continue
        for mode in MODES:
            full, partial = balance(model, world, ep, sharded, mode)
            dense, ok = "sharded" if sharded else "replicated", full.ok and partial.ok
            print(
                f"{name:16} {world:2} ranks ep {ep:2} dense {dense:10} {mode:10} heaviest/mean {partial.over_mean:.4f}"
                f" (forced {partial.bound_over_mean:.4f}), full {full.over_mean:.4f} (forced {full.bound_over_mean:.4f})"
                f"   {'ok' if ok else 'ABOVE'}",
                flush=True,
            )
            row = {"world": world, "ep": ep, "dense": dense, "mode": mode, "partial": asdict(partial), "full": asdict(full), "ok": ok}
            rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--narrower", type=int, default=4, help="divide every width by this for the real files")
    parser.add_argument("--folder", type=Path, help="where the files are written for a while (default: the temporary folder)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result: dict[str, object] = {
        "command": ["python", "-m", "tools.checkpoint_bytes", *sys.argv[1:]],
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "seed": SEED,
    }
    ok, found = True, shapes()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        for name in options.shapes:
            sizes, ranks = compare(name, found[name], options.narrower, Path(temporary)), divisions(name, found[name])
            result[name] = sizes | {"divisions": ranks}
            ok = ok and bool(sizes["ok"]) and all(row["ok"] for row in ranks)
    print("every target is met" if ok else "A TARGET IS MISSED")
    result["ok"] = ok
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if ok else 1


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
