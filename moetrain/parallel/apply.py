"""Sharding a model made on the meta device: FSDP2 for dense parameters over dp and for experts over edp, or replication."""

from collections.abc import Iterator
from functools import partial
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


def served_twice(model: GPT) -> list[MoE]:
    """MoE modules of more than one block (DGMoE-Share)."""
    banks = [place.bank for place in model.places if place.bank is not None]
    return [module for module in model.modules() if isinstance(module, MoE) and banks.count(module.bank) > 1]


def fsdp_modules(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))


class Sharding:
    """What FSDP2 does with a model from pass to pass; nothing with one that it does not shard."""

    def __init__(self, model: GPT) -> None:
        self._model = model
        self._banks = [ShardedBank(module) for module in fsdp_modules(model) if isinstance(module, Experts)]

    def sync_gradients(self, is_last: bool) -> None:
        """Whether the backward pass to come is a step's last, whose gradients are summed over ranks."""
        for module in fsdp_modules(self._model):
            module.set_requires_gradient_sync(is_last, recurse=False)
            module.set_is_last_backward(is_last)
        for bank in self._banks:
            bank.reduces = is_last

    def reshard(self) -> None:
        """Makes every parameter its shard again: FSDP2 leaves the root's whole after a forward pass without a backward one, and a bank's
        after one that ended with an error."""
        for module in fsdp_modules(self._model):
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()
        if isinstance(self._model, FSDPModule):
            self._model.set_reshard_after_forward(False, recurse=False)  # its backward pass follows at once


class ShardedBank:
    """A bank is gathered once for all calls of a visit, in the forward and again in the backward, and its gradients are summed once."""

    def __init__(self, bank: Experts) -> None:
        self.reduces = True  # in the backward pass to come
        bank.register_forward_pre_hook(self._before, with_kwargs=True)
        bank.register_forward_hook(self._behind, with_kwargs=True)

    def _before(self, bank: nn.Module, args: tuple[object, ...], kwargs: dict[str, Call | None]) -> None:
        assert isinstance(bank, FSDPModule)
        call = kwargs.get("call")
        bank.set_reshard_after_forward(call is None or call.is_last, recurse=False)

    def _behind(self, bank: nn.Module, args: tuple[object, ...], kwargs: dict[str, Call | None], out_RD: Tensor) -> None:
        call = kwargs.get("call")
        if out_RD.requires_grad:
            out_RD.register_hook(partial(self._before_backward, bank, call is None or call.is_first))

    def _before_backward(self, bank: nn.Module, is_last: bool, grad_RD: Tensor) -> None:
        assert isinstance(bank, FSDPModule)
        bank.set_reshard_after_backward(is_last, recurse=False)
        bank.set_requires_gradient_sync(self.reduces and is_last, recurse=False)


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
