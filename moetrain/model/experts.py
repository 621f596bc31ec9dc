"""Expert banks: the weights of one layer's experts on this rank, and the grouped matmul over them.

R rows sorted by expert slot, e experts of this rank, D hidden, F FFN.
"""

from dataclasses import dataclass, field
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from moetrain.model.config import fits_grouped_mm
from moetrain.model.mlp import gated, gated_backward

METHODS = ("auto", "loop", "bmm", "grouped_mm")


@dataclass
class Visit:
    """All calls of a bank by one block in one forward pass: one per gating and token chunk."""

    num_calls: int
    done: int = 0
    copies: dict[str, Tensor] = field(default_factory=dict)  # by name: weights in autocast's type, made by who needs them first

    def next(self) -> "Call":
        self.done += 1
        return Call(self, self.done)


@dataclass(frozen=True)
class Call:
    """One call of a visit. A recomputed call is the same one."""

    visit: Visit
    number: int  # from 1

    @property
    def is_first(self) -> bool:
        """So the backward pass comes by last."""
        return self.number == 1

    @property
    def is_last(self) -> bool:
        return self.number == self.visit.num_calls


class ExpertBank(Protocol):
    """Resident weights, or slots filled from a slower tier."""

    def prefetch(self, experts: tuple[int, ...]) -> None:
        """A hint that these global experts are needed soon; returns at once."""
        ...

    def __call__(self, rows_RD: Tensor, count_e: Tensor, call: Call | None = None, shares_copies: bool = True) -> Tensor:
        """Expert outputs [R, D]; count_e (int64, host) says how many consecutive rows each slot takes. Under autocast all calls of a
        visit that share them need one copy of the weights; without a `call` every one makes its own."""
        ...


class Experts(nn.Module):
    """Resident SwiGLU experts, the expert as leading axis. `experts[slot]` is the global number."""

    def __init__(self, bank: str, experts: tuple[int, ...], hidden_size: int, ffn_size: int, method: str = "auto") -> None:
        super().__init__()
        self.bank, self.experts, self.method = bank, experts, method
        self.gate_up_proj = nn.Parameter(torch.empty(len(experts), 2 * ffn_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(len(experts), hidden_size, ffn_size))

    def prefetch(self, experts: tuple[int, ...]) -> None:
        """Resident weights are always there."""

    def forward(self, rows_RD: Tensor, count_e: Tensor, call: Call | None = None, shares_copies: bool = True) -> Tensor:
        copies = call.visit.copies if call is not None and shares_copies else None
        gate_up, down = self._weight("gate_up_proj", rows_RD, copies), self._weight("down_proj", rows_RD, copies)
        return grouped_swiglu(rows_RD, count_e, gate_up, down, self.method)

    def _weight(self, name: str, rows_RD: Tensor, copies: dict[str, Tensor] | None) -> Tensor:
        weight = getattr(self, name)
        kind = rows_RD.device.type
        if copies is None or not torch.is_autocast_enabled(kind) or weight.dtype != torch.float32:
            return weight
        if name not in copies:
            copies[name] = weight.detach().to(torch.get_autocast_dtype(kind))
        return cast(Tensor, _InLowPrecision.apply(weight, copies[name]))


class _InLowPrecision(torch.autograd.Function):
    """A parameter as its copy in another type, of which there is one for many uses. Gradients are summed in the parameter's type."""

    @staticmethod
    def forward(ctx: FunctionCtx, weight: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = weight.dtype  # type: ignore[attr-defined]
        return copy.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None  # type: ignore[attr-defined]


def grouped_swiglu(rows_RD: Tensor, count_e: Tensor, gate_up_eGD: Tensor, down_eDF: Tensor, method: str = "auto") -> Tensor:
    """SwiGLU of every row by its slot's weights. The three methods agree within rounding (tests state the tolerance).

    auto: `grouped_mm` on CUDA in bfloat16 where widths allow it, else `loop`: on CPUs it ties with `grouped_mm`, ahead of `bmm`
    (benchmarks/experts_cpu.json). On Blackwell `loop`, too: torch's kernel gives experts without rows wrong gradients there
    (pytorch issues 172439 and 193633).
    """
    if method == "auto":
        low = rows_RD.dtype == torch.bfloat16 or torch.is_autocast_enabled(rows_RD.device.type)
        fits = fits_grouped_mm(rows_RD.shape[1], down_eDF.shape[2], 2)
        method = "grouped_mm" if low and fits and _has_sound_grouped_mm(rows_RD.device) else "loop"
    if method == "loop":
        return _loop(rows_RD, count_e, gate_up_eGD, down_eDF)
    if method == "bmm":
        return _padded_bmm(rows_RD, count_e, gate_up_eGD, down_eDF)
    return _grouped_mm(rows_RD, count_e, gate_up_eGD, down_eDF)


def _has_sound_grouped_mm(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 10


def _loop(rows_RD: Tensor, count_e: Tensor, gate_up_eGD: Tensor, down_eDF: Tensor) -> Tensor:
    """One expert after the other; under autocast in its type."""
    if torch.is_autocast_enabled(rows_RD.device.type) and rows_RD.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(rows_RD.device.type)
        rows_RD, gate_up_eGD, down_eDF = rows_RD.to(dtype), gate_up_eGD.to(dtype), down_eDF.to(dtype)
    is_kept = torch.is_grad_enabled() and any(x.requires_grad for x in (rows_RD, gate_up_eGD, down_eDF))
    return cast(Tensor, _Loop.apply(rows_RD, gate_up_eGD, down_eDF, count_e.tolist(), is_kept))


class _Loop(torch.autograd.Function):
    """SwiGLU of one expert's rows after the other's, each product written where it belongs.

    Autograd would do the same products, and copy outputs, row gradients and all weight gradients together afterwards. What lies between two
    products is kept of all rows if `is_kept`, else of one expert's at a time.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, rows_RD: Tensor, gate_up_eGD: Tensor, down_eDF: Tensor, counts: list[int], is_kept: bool) -> Tensor:
        height = rows_RD.shape[0] if is_kept else max(counts, default=0)
        gate_up_RG, hidden_RF = (rows_RD.new_empty(height, width) for width in (gate_up_eGD.shape[1], down_eDF.shape[2]))
        out_RD = torch.empty_like(rows_RD)
        parts = zip(rows_RD.split(counts), out_RD.split(counts), gate_up_eGD, down_eDF, strict=True)
        start = 0
        for rows, out, gate_up_weight, down_weight in parts:
            place = slice(start, start + len(rows))
            gate_up, hidden = torch.mm(rows, gate_up_weight.t(), out=gate_up_RG[place]), hidden_RF[place]
            gate, up = gate_up.chunk(2, dim=-1)
            torch.ops.aten.silu.out(gate, out=hidden)
            torch.mm(hidden.mul_(up), down_weight.t(), out=out)
            start += len(rows) if is_kept else 0
        if is_kept:
            ctx.save_for_backward(rows_RD, gate_up_RG, hidden_RF, gate_up_eGD, down_eDF)
        ctx.counts = counts  # type: ignore[attr-defined]
        return out_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_RD: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        rows_RD, gate_up_RG, hidden_RF, gate_up_eGD, down_eDF = ctx.saved_tensors  # type: ignore[attr-defined]
        by_row = (rows_RD, gate_up_RG, hidden_RF, grad_RD, grad_rows_RD := torch.empty_like(rows_RD))
        by_expert = (gate_up_eGD, down_eDF, grad_gate_up_eGD := torch.empty_like(gate_up_eGD), grad_down_eDF := torch.empty_like(down_eDF))
        parts = zip(*(x.split(ctx.counts) for x in by_row), *by_expert, strict=True)  # type: ignore[attr-defined]
        for rows, gate_up, hidden, grad, grad_rows, gate_up_weight, down_weight, grad_gate_up_weight, grad_down_weight in parts:
            torch.mm(grad.t(), hidden, out=grad_down_weight)
            grad_gate_up = gated_backward(grad @ down_weight, gate_up)
            torch.mm(grad_gate_up.t(), rows, out=grad_gate_up_weight)
            torch.mm(grad_gate_up, gate_up_weight, out=grad_rows)
        return grad_rows_RD, grad_gate_up_eGD, grad_down_eDF, None, None


def _padded_bmm(rows_RD: Tensor, count_e: Tensor, gate_up_eGD: Tensor, down_eDF: Tensor) -> Tensor:
    """Rows padded to the fullest expert: two batched matmuls."""
    slot_R = torch.repeat_interleave(torch.arange(count_e.numel()), count_e).to(rows_RD.device)
    start_e = (count_e.cumsum(0) - count_e).to(rows_RD.device)
    place_R = torch.arange(rows_RD.shape[0], device=rows_RD.device) - start_e[slot_R]
    height = max(int(count_e.max()), 1) if count_e.numel() else 1
    padded = rows_RD.new_zeros(count_e.numel(), height, rows_RD.shape[1]).index_put((slot_R, place_R), rows_RD)
    hidden = gated(torch.bmm(padded, gate_up_eGD.transpose(1, 2)))
    return torch.bmm(hidden, down_eDF.transpose(1, 2))[slot_R, place_R]


def _grouped_mm(rows_RD: Tensor, count_e: Tensor, gate_up_eGD: Tensor, down_eDF: Tensor) -> Tensor:
    """torch's grouped matmul; float32 rows under autocast are cast to its dtype."""
    if torch.is_autocast_enabled(rows_RD.device.type):
        dtype = torch.get_autocast_dtype(rows_RD.device.type)
        rows_RD, gate_up_eGD, down_eDF = rows_RD.to(dtype), gate_up_eGD.to(dtype), down_eDF.to(dtype)
    end_e = count_e.cumsum(0).to(torch.int32)
    if rows_RD.is_cuda:  # from pinned memory the host need not wait until the device comes by
        end_e = end_e.pin_memory().to(rows_RD.device, non_blocking=True)
    hidden = gated(torch.nn.functional.grouped_mm(rows_RD, gate_up_eGD.transpose(1, 2), offs=end_e))
    return torch.nn.functional.grouped_mm(hidden, down_eDF.transpose(1, 2), offs=end_e)
