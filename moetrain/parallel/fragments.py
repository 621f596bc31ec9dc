"""A live model and its optimizer as ModelState: which rank holds which box of which logical tensor."""

from collections.abc import Callable, Iterator

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moetrain.dist.mesh import Mesh
from moetrain.model.experts import Experts
from moetrain.model.gpt import GPT
from moetrain.model.state import Box, Fragment, ModelState

Components = Callable[[str], dict[str, Tensor]]
"""Parameter name -> optimizer components (m, v, step) shaped like this rank's part; {} for a buffer."""


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a parameter or gradient, a view."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def bank_of(name: str, model: GPT) -> Experts | None:
    """The expert bank a parameter belongs to."""
    owner = model.get_submodule(name.rpartition(".")[0])
    return owner if isinstance(owner, Experts) else None


def model_state(model: GPT, mesh: Mesh, components: Components) -> ModelState:
    """Fragments of every parameter and persistent buffer, as views."""
    state: ModelState = []
    for name, tensor in _named_tensors(model):
        parts = {"master": local(tensor), **components(name)}
        bank = bank_of(name, model)
        for component, data in parts.items():
            if bank is not None:
                state += _of_experts(name, component, bank, tensor, data, mesh)
            else:
                state += _of_dense(name, component, tensor, data, mesh)
    return state


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _of_dense(name: str, component: str, tensor: Tensor, data: Tensor, mesh: Mesh) -> ModelState:
    holders = tuple(range(mesh.dp.size))
    if component == "step":
        return [Fragment(name, component, None, None, (), Box.whole(()), holders, data)]
    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return [Fragment(name, component, None, None, shape, Box.whole(shape), holders, data)]
    if data.numel() == 0:
        return []
    box = Box((shard_start(shape[0], mesh.dp.size, mesh.dp.index),) + (0,) * (len(shape) - 1), tuple(data.shape))
    return [Fragment(name, component, None, None, shape, box, (mesh.dp.index,), data)]


def _of_experts(name: str, component: str, bank: Experts, tensor: Tensor, data: Tensor, mesh: Mesh) -> ModelState:
    """One fragment per expert whose weights are here. Under FSDP2 a rank holds whole experts: a run of slots, maybe none."""
    sharded = isinstance(tensor, DTensor)
    first = shard_start(len(bank.experts), mesh.edp.size, mesh.edp.index) if sharded else 0
    holders = (mesh.dp.index,) if sharded else mesh.edp.ranks
    shape = () if component == "step" else tuple(tensor.shape[1:])
    return [
        Fragment(name, component, bank.bank, bank.experts[first + slot], shape, Box.whole(shape), holders, data[slot])
        for slot in range(data.shape[0])
    ]


def shard_start(size: int, num_shards: int, shard: int) -> int:
    """First index of an FSDP2 shard of a dim of `size`: shards of ceil(size / num_shards), the last ones short or empty."""
    return min(size, shard * -(-size // num_shards))
