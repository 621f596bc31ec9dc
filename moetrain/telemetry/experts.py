"""Expert load: how evenly tokens spread over experts, and snapshots of it in the run folder. No torch.

L MoE layers, E experts.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moetrain.base.log import logger

SNAPSHOTS = "experts"


@dataclass(frozen=True)
class Balance:
    """Averages over layers, `dead` is a sum. An even spread is 1, 1, 0."""

    max_over_mean: float  # busiest expert against the even share: what expert-parallel ranks wait for
    entropy: float  # of the load, divided by ln(E): 1 = even, 0 = one expert takes all
    dead: int  # experts without a single pair


def balance(load_LE: np.ndarray) -> Balance:
    """Summary of pairs per layer and expert, int64 [L, E] with L and E at least 1. A layer without pairs counts as even."""
    total_L1 = load_LE.sum(axis=1, keepdims=True)
    num_experts = load_LE.shape[1]
    share_LE = np.divide(load_LE, total_L1, out=np.full(load_LE.shape, 1 / num_experts), where=total_L1 > 0)
    log_LE = np.log(share_LE, out=np.zeros_like(share_LE), where=share_LE > 0)
    entropy_L = -(share_LE * log_LE).sum(axis=1)
    return Balance(
        max_over_mean=float(share_LE.max(axis=1).mean() * num_experts),
        entropy=float(entropy_L.mean() / np.log(num_experts)) if num_experts > 1 else 1.0,
        dead=int((load_LE == 0).sum()),
    )


def relative_load(load_LE: np.ndarray) -> np.ndarray:
    """float [L, E]: each expert's pairs over its layer's even share; 1 = exactly its share, a layer without pairs is all 1."""
    mean_L1 = load_LE.mean(axis=1, keepdims=True)
    return np.divide(load_LE, mean_L1, out=np.ones(load_LE.shape), where=mean_L1 > 0)


@dataclass(frozen=True)
class Snapshot:
    """Pairs per layer and expert over the steps since the snapshot before, ending with `step`; one bank name per layer."""

    step: int
    load_LE: np.ndarray
    banks: tuple[str, ...]


def save_snapshot(run: Path, snapshot: Snapshot) -> None:
    """Writes `experts/step-*.npz`; it appears whole or not at all, and replaces that of an earlier try of the same step.

    A full disk costs the snapshot, with a warning: showing numbers never ends a run.
    """
    folder = run / SNAPSHOTS
    file = folder / f"step-{snapshot.step:08d}.npz"
    draft = file.with_suffix(".tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with draft.open("wb") as stream:
            banks = np.array(snapshot.banks, dtype=np.str_)
            np.savez(stream, load=snapshot.load_LE.astype(np.int64), step=np.int64(snapshot.step), banks=banks)
        os.replace(draft, file)
    except OSError as error:
        logger("telemetry").warning("The expert load of step %d cannot be written: %s", snapshot.step, error)


def load_snapshots(run: Path) -> list[Snapshot]:
    """All snapshots of a run folder, by step."""
    snapshots = []
    for file in sorted((run / SNAPSHOTS).glob("step-*.npz")):
        with np.load(file) as arrays:
            snapshots.append(Snapshot(int(arrays["step"]), arrays["load"], tuple(str(bank) for bank in arrays["banks"])))
    return snapshots


def layer_labels(banks: tuple[str, ...]) -> list[str]:
    """Short names of layers for an axis: `blocks.3.moe.experts` is `block 3`."""
    parts = [bank.split(".") for bank in banks]
    return [f"block {part[1]}" if len(part) > 1 and part[0] == "blocks" else ".".join(part) for part in parts]
