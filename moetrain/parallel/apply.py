"""Sharding a model made on the meta device: FSDP2 for dense parameters over dp and for experts over edp, or replication."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from moetrain.base.errors import MoetrainError
from moetrain.dist.mesh import Mesh
from moetrain.model.attention import Attention
from moetrain.model.experts import Call, Experts
from moetrain.model.gpt import GPT
from moetrain.model.mlp import SwiGLU
from moetrain.model.moe import MoE


def apply_fsdp(model: GPT, mesh: Mesh) -> None:
    """Shards in place. Expert banks are sharded over edp (whole experts; some ranks may hold none), or left alone when edp is 1.

    Gradients are summed, never averaged: the loss is already divided by the global number of tokens.
    """
    banks = [module for module in model.modules() if isinstance(module, Experts)]
    if mesh.edp.size > 1:
        for bank in banks:
            fully_shard(bank, mesh=mesh.edp.device_mesh)
            gather_once(bank)
    expert_parameters = {parameter for bank in banks for parameter in bank.parameters()}
    for moe in served_twice(model):
        for gate in (moe.norm, moe.router):  # of no one block: gathered whenever one of its pairs calls it
            fully_shard(gate, mesh=mesh.dp.device_mesh)
    for block in model.blocks:
        fully_shard(block, mesh=mesh.dp.device_mesh, ignored_params=expert_parameters)
    fully_shard(model, mesh=mesh.dp.device_mesh, ignored_params=expert_parameters)
    for module in fsdp_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def gather_once(bank: Experts) -> None:
    """Keeps a bank that FSDP2 shards whole from the first call of a visit to the last, in the forward and again in the backward pass."""

    def keep(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, Call | None]) -> None:
        assert isinstance(module, FSDPModule)
        call = kwargs.get("call")
        module.set_reshard_after_forward(call is None or call.is_last, recurse=False)

    def keep_again(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, Call | None], out_RD: Tensor) -> None:
        assert isinstance(module, FSDPModule)
        call = kwargs.get("call")
        is_first = call is None or call.is_first
        if out_RD.requires_grad:
            out_RD.register_hook(lambda grad_RD: module.set_reshard_after_backward(is_first, recurse=False))

    bank.register_forward_pre_hook(keep, with_kwargs=True)
    bank.register_forward_hook(keep_again, with_kwargs=True)


def served_twice(model: GPT) -> list[MoE]:
    """MoE modules of more than one block (DGMoE-Share)."""
    banks = [place.bank for place in model.places if place.bank is not None]
    return [module for module in model.modules() if isinstance(module, MoE) and banks.count(module.bank) > 1]


def fsdp_modules(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def reshard(model: nn.Module) -> None:
    """Makes every parameter its shard again: FSDP2 leaves the root's whole after a forward pass without a backward one."""
    for module in fsdp_modules(model):
        module.reshard()


def apply_compile(model: GPT, device: torch.device) -> None:
    """torch.compile of every attention and feed-forward; routing, exchanges and the residual stream stay eager.

    Raises MoetrainError where torch's compiler for CPUs cannot link: it does not quote the folder it is installed in.
    """
    home = str(Path(torch.__file__).parent)
    if device.type == "cpu" and " " in home:
        message = f"torch.compile cannot compile for a CPU where torch's own path holds a space ({home})."
        raise MoetrainError(message, "Move the environment, or train with engine.compile=false.")
    for module in model.modules():
        if isinstance(module, Attention | SwiGLU):
            module.compile()
