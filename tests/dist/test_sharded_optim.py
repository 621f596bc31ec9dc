"""Four ranks, FSDP2 over dp and edp: clipping and AdamW equal one process that holds everything."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from moetrain.dist.mesh import Mesh
from moetrain.dist.world import World
from moetrain.optim.adamw import AdamW, NamedParameter
from moetrain.optim.clip import GradientShard, Kind, clip_gradients
from moetrain.optim.config import OptimConfig
from tests.kit import run_ranks

CONFIG = OptimConfig(weight_decay=0.2)
NUM_EXPERTS = 6  # three of an ep rank: its two edp ranks hold two and one


def whole(name: str, seed: int) -> Tensor:
    shape = {"dense": (5, 3), "small": (2, 3), "experts": (NUM_EXPERTS, 4, 2)}[name]  # `small` leaves two of four ranks nothing
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + len(name)))


def my_experts(mesh: Mesh) -> slice:
    count = NUM_EXPERTS // mesh.ep.size
    return slice(mesh.ep.index * count, (mesh.ep.index + 1) * count)


class Parts(nn.Module):
    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(value.clone()))


def part(tensor: Tensor, like: Tensor) -> Tensor:
    """What FSDP2's dim 0 chunks leave this rank of `tensor`."""
    assert isinstance(like, DTensor)
    mesh = like.device_mesh
    chunks = tensor.chunk(mesh.size())
    index = mesh.get_local_rank()
    return chunks[index] if index < len(chunks) else tensor[:0]


def check_sharded(world: World) -> list[float]:
    mesh = Mesh(world, ep=2)
    mine = my_experts(mesh)
    dense, experts = Parts({"dense": whole("dense", 0), "small": whole("small", 0)}), Parts({"experts": whole("experts", 0)[mine]})
    assert mesh.dp.device_mesh is not None and mesh.edp.device_mesh is not None
    fully_shard(dense, mesh=mesh.dp.device_mesh)
    fully_shard(experts, mesh=mesh.edp.device_mesh)
    parameters = dict(dense.named_parameters()) | dict(experts.named_parameters())
    optimizer = AdamW([NamedParameter(n, p, "bank" if n == "experts" else None, decay=True) for n, p in parameters.items()], CONFIG)
    ages = torch.arange(NUM_EXPERTS) * 10
    step = optimizer.moments("experts")[2]
    step.copy_(part(ages[mine], parameters["experts"]))

    reference = {name: nn.Parameter(whole(name, 0)) for name in ("dense", "small", "experts")}
    single = AdamW([NamedParameter(n, p, "bank" if n == "experts" else None, decay=True) for n, p in reference.items()], CONFIG)
    single.moments("experts")[2].copy_(ages)
    norms = []
    for number in range(1, 4):
        gradients = {name: whole(name, number) for name in reference}
        for name, parameter in parameters.items():
            value = gradients[name][mine] if name == "experts" else gradients[name]
            assert isinstance(parameter, DTensor)
            shard = part(value, parameter).clone()
            parameter.grad = DTensor.from_local(
                shard, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
            )
        kinds = {"dense": Kind.DENSE_SHARDED, "small": Kind.DENSE_SHARDED, "experts": Kind.EXPERT_SHARDED}
        shards = [GradientShard(p.grad.to_local(), kinds[n]) for n, p in parameters.items() if isinstance(p.grad, DTensor)]
        norms.append(clip_gradients(shards, 1.0, mesh))
        total = torch.cat([g.flatten() for g in gradients.values()]).norm()
        assert norms[-1] == pytest.approx(float(total), rel=1e-14)
        for name, parameter in reference.items():
            parameter.grad = gradients[name] / total
        optimizer.step(0.05)
        single.step(0.05)
    for name, parameter in parameters.items():
        assert isinstance(parameter, DTensor)
        expected = reference[name].detach()[mine] if name == "experts" else reference[name].detach()
        torch.testing.assert_close(parameter.to_local().detach(), part(expected, parameter), rtol=1e-12, atol=1e-13)
    return norms + check_replicated_norm(mesh)


def check_replicated_norm(mesh: Mesh) -> list[float]:
    """Nothing sharded: dense counts once, experts once per ep rank."""
    gradients = {name: whole(name, 8) for name in ("dense", "small", "experts")}
    shards = [GradientShard(gradients[name].clone(), Kind.DENSE_REPLICATED) for name in ("dense", "small")]
    shards.append(GradientShard(gradients["experts"][my_experts(mesh)].clone(), Kind.EXPERT_REPLICATED))
    norm = clip_gradients(shards, 0.5, mesh)
    total = float(torch.cat([g.flatten() for g in gradients.values()]).norm())
    assert norm == pytest.approx(total, rel=1e-14)
    torch.testing.assert_close(shards[0].tensor, gradients["dense"] * (0.5 / total))
    return [norm]


@pytest.mark.dist
def test_sharded_parameters_clip_and_update_like_whole_ones(tmp_path: Path) -> None:
    norms = run_ranks(check_sharded, 4, tmp_path)
    assert all(norm == norms[0] for norm in norms)
