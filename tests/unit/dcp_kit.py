"""What the tests of DCP checkpoints share: recovery points to publish, and stock ways to load what was published."""

from pathlib import Path

import torch
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.filesystem import FileSystemReader

from moetrain.base.clock import SystemClock
from moetrain.checkpoint.dcp import KEYS, path_of
from moetrain.checkpoint.dcp_import import DcpFolder, read_into
from moetrain.store.io import Io
from moetrain.store.manifest import Manifest
from moetrain.store.objects import CheckpointFolder
from tests.unit.checkpoint_kit import Job

Nested = dict[str, dict]


def three_points(tmp_path: Path) -> Job:
    """Three recovery points; of the experts of the last one, some are as old as the first."""
    job = Job(tmp_path / "checkpoint", 2, 2, sharded=True, keep=10)
    for step in (10, 20, 30):
        job.save(step)
    return job


def points(folder: CheckpointFolder) -> list[Manifest]:
    """Oldest first."""
    return [point for point in folder.history() if isinstance(point, Manifest)][::-1]


def versions(point: Manifest) -> dict[tuple[str, int], int]:
    """The version of every expert in a recovery point."""
    return {group: point.step - age for group, age in point.ages().items()}


def stacked(whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By DCP's key, the experts of a bank as one tensor."""
    experts: dict[str, dict[int, torch.Tensor]] = {}
    found = {}
    for key, values in whole.items():
        name, component, *expert = key.split(":")
        flat = KEYS[component].format(name)
        if expert:
            experts.setdefault(flat, {})[int(expert[0])] = values
        else:
            found[flat] = values
    return found | {key: torch.stack([rows[number] for number in sorted(rows)]) for key, rows in experts.items()}


def put(nested: dict, path: tuple[str, ...], value: object) -> None:
    for part in path[:-1]:
        nested = nested.setdefault(part, {})
    nested[path[-1]] = value


def nested_of(flat: dict[str, torch.Tensor]) -> Nested:
    nested: Nested = {}
    for key, value in flat.items():
        put(nested, path_of(key), value)
    return nested


def load(path: Path, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the stock reader brings into a nested state dictionary of these shapes and types."""
    flat = {key: torch.zeros_like(value) for key, value in like.items()}
    state_dict_loader.load(nested_of(flat), storage_reader=FileSystemReader(path), no_dist=True)
    return flat


def read_back(path: Path, target: Path) -> Manifest:
    return read_into(CheckpointFolder(target / "checkpoint", Io()), DcpFolder(path), SystemClock())
