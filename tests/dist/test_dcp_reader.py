"""A tree of partial checkpoints, loaded and resharded on two processes by DCP's stock reader."""

from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from moetrain.checkpoint.dcp import Tree
from moetrain.dist.world import World
from moetrain.store.io import Io
from moetrain.store.objects import CheckpointFolder
from tests.kit import run_ranks
from tests.unit.checkpoint_kit import Job, assert_equal, expected
from tests.unit.test_dcp import nested_of, points, stacked, versions

pytestmark = [pytest.mark.dist, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]


def load_sharded(world: World, path: Path, wanted: dict[str, torch.Tensor]) -> list[int]:
    """Loads into tensors cut along dim 0, then 1, over the ranks and compares; how many tensors were cut."""
    mesh = init_device_mesh("cpu", (world.size,))
    return [load_cut(world, mesh, path, wanted, dim) for dim in (0, 1)]


def load_cut(world: World, mesh: DeviceMesh, path: Path, wanted: dict[str, torch.Tensor], dim: int) -> int:
    flat: dict[str, torch.Tensor] = {}
    for key, values in wanted.items():
        placement = Shard(dim) if values.dim() > dim else Replicate()
        flat[key] = DTensor.from_local(
            torch.zeros_like(shard(values, dim, world)), mesh, [placement], run_check=False, shape=values.shape, stride=values.stride()
        )
    state_dict_loader.load(nested_of(flat), storage_reader=FileSystemReader(path))
    for key, values in flat.items():
        assert isinstance(values, DTensor)
        assert torch.equal(values.to_local(), shard(wanted[key], dim, world)), key
    return sum(values.dim() > dim for values in wanted.values())


def shard(values: torch.Tensor, dim: int, world: World) -> torch.Tensor:
    """This rank's part as torch.chunk cuts it; the last ranks of a short dim hold nothing."""
    if values.dim() <= dim:
        return values
    parts = values.chunk(world.size, dim)
    return parts[world.rank].contiguous() if world.rank < len(parts) else values.narrow(dim, 0, 0)


def test_stock_reader_reshards_a_tree_on_two_ranks(tmp_path: Path):
    job = Job(tmp_path / "checkpoint", 3, 3, sharded=True)
    for step in (10, 20, 30):
        job.save(step)
    folder, tree = CheckpointFolder(tmp_path / "checkpoint", Io()), Tree(tmp_path / "tree")
    for point in points(folder):
        tree.add(folder, point)
    newest = points(folder)[-1]
    assert len(set(versions(newest).values())) > 1
    wanted = stacked(expected(30, versions(newest)))
    cut = run_ranks(load_sharded, 2, tmp_path, tree.folder_of(30), wanted)
    assert cut[0] == cut[1] == [sum(values.dim() > dim for values in wanted.values()) for dim in (0, 1)]
    flat = {key: torch.zeros_like(value) for key, value in wanted.items()}
    state_dict_loader.load(nested_of(flat), storage_reader=FileSystemReader(tree.folder_of(30)), no_dist=True)
    assert_equal(flat, wanted)
