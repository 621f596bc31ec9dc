"""Moving rows to their experts and back: the seam between a layer and the ranks.

A dispatcher owns no weights and is no Module; several tickets may be open at once. N tokens, P pairs, R received rows,
e experts of this rank, L levels, D hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import embedding_bag

from moetrain.routing.types import Routing


class Ticket(Protocol):
    """One exchange under way. Its buffers belong to the dispatcher until `receive` or `combine` returns them."""


class Counts(Protocol):
    """Rows per source and expert, perhaps still on the way."""


class Dispatcher(Protocol):
    """The five steps of an expert layer's communication, forward and (through autograd) backward."""

    def announce(self, routings: Sequence[Routing]) -> Sequence[Counts]:
        """Starts the exchange of counts: one for all token chunks of a gating."""
        ...

    def send(self, x_ND: Tensor, routing: Routing, counts: Counts) -> Ticket:
        """Starts moving rows to their experts; waits for counts only. x_ND must not change until `receive`."""
        ...

    def receive(self, ticket: Ticket) -> tuple[Tensor, Tensor]:
        """Waits. rows_RD sorted by local expert slot and, within it, by source rank and token; count_e (int64, on the host)."""
        ...

    def send_back(self, rows_RD: Tensor, ticket: Ticket) -> Ticket:
        """Starts moving expert outputs back; returns at once."""
        ...

    def combine(self, ticket: Ticket) -> Tensor:
        """Waits. y_ND: for every token the weighted sum of its experts' outputs; zero for a token that lost all its pairs."""
        ...


@dataclass
class LocalCounts:
    """Rows per expert, on the host."""

    count_e: Tensor


@dataclass
class LocalTicket:
    """Rows of one layer, in the order of `order_P`: pairs sorted by expert."""

    routing: Routing
    num_tokens: int
    order_P: Tensor
    rows_RD: Tensor
    count_e: Tensor


class LocalDispatcher:
    """All experts on this rank: a permutation and its inverse. The one-process twin of every other dispatcher."""

    def announce(self, routings: Sequence[Routing]) -> Sequence[Counts]:
        return [LocalCounts(routing.count_EL.sum(1).cpu()) for routing in routings]

    def send(self, x_ND: Tensor, routing: Routing, counts: Counts) -> Ticket:
        assert isinstance(counts, LocalCounts)
        order_P = torch.argsort(routing.expert_P, stable=True)
        return LocalTicket(routing, x_ND.shape[0], order_P, spread(x_ND, routing, order_P), counts.count_e)

    def receive(self, ticket: Ticket) -> tuple[Tensor, Tensor]:
        assert isinstance(ticket, LocalTicket)
        return ticket.rows_RD, ticket.count_e

    def send_back(self, rows_RD: Tensor, ticket: Ticket) -> Ticket:
        assert isinstance(ticket, LocalTicket)
        ticket.rows_RD = rows_RD
        return ticket

    def combine(self, ticket: Ticket) -> Tensor:
        assert isinstance(ticket, LocalTicket)
        return combine_pairs(ticket.rows_RD, ticket.routing, ticket.order_P, ticket.num_tokens)


def combine_pairs(rows_PD: Tensor, routing: Routing, order_P: Tensor, num_tokens: int) -> Tensor:
    """[N, D]: weighted sum per token of rows that stand in `order_P` (row i belongs to pair order_P[i]).

    Summed pair by pair in token order, so the result does not depend on where experts live.
    """
    weight_P = routing.weight_P.to(rows_PD.dtype)
    return cast(Tensor, _Combine.apply(rows_PD, weight_P, routing.token_P, order_P, routing.pairs_per_token, num_tokens))


def sum_per_token(
    rows_PD: Tensor, place_P: Tensor, token_P: Tensor, pairs_per_token: int | None, num_tokens: int, weight_P: Tensor | None = None
) -> Tensor:
    """[N, D]: sums of rows_PD[place_P], times `weight_P`, over the pairs of every token; zero for one without any.

    Pairs stand token by token. On CPUs in one pass, by torch's embedding bag. Elsewhere a plain sum where all tokens have as many pairs:
    index_add on a GPU adds in any order, and three addends show it.
    """
    if rows_PD.is_cpu and not torch.compiler.is_compiling():
        token_N = torch.arange(num_tokens)
        first_N = torch.searchsorted(token_P, token_N) if pairs_per_token is None else token_N * pairs_per_token
        return embedding_bag(place_P, rows_PD, first_N, mode="sum", per_sample_weights=weight_P)
    by_pair_PD = rows_PD.index_select(0, place_P)
    if weight_P is not None:
        by_pair_PD = by_pair_PD * weight_P.unsqueeze(1)
    if pairs_per_token is None:
        return rows_PD.new_zeros(num_tokens, rows_PD.shape[1]).index_add(0, token_P, by_pair_PD)
    return by_pair_PD.view(num_tokens, pairs_per_token, rows_PD.shape[1]).sum(1)


def inverse(order: Tensor) -> Tensor:
    """The permutation that undoes `order`."""
    result = torch.empty_like(order)
    result[order] = torch.arange(order.numel(), device=order.device)
    return result


def permute(rows: Tensor, order: Tensor, back: Tensor) -> Tensor:
    """rows[order], of a permutation and its inverse; a gather both ways (autograd's own backward of indexing scatters, several times slower
    on CPUs)."""
    return cast(Tensor, _Permute.apply(rows, order, back))


def spread(x_ND: Tensor, routing: Routing, order_P: Tensor) -> Tensor:
    """x_ND[token_P[order_P]], a row for every pair. Its gradient is summed in the order of pairs: the same wherever experts live."""
    return cast(Tensor, _Spread.apply(x_ND, routing.token_P, order_P, routing.pairs_per_token))


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return rows.index_select(0, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad.index_select(0, back), None, None


class _Combine(torch.autograd.Function):
    """Keeps the rows as they came. Autograd would keep them in token order, and spread the gradient over all pairs before it weighs it."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, rows_PD: Tensor, weight_P: Tensor, token_P: Tensor, order_P: Tensor, pairs_per_token: int | None, num_tokens: int
    ) -> Tensor:
        place_P = inverse(order_P)
        ctx.save_for_backward(rows_PD, weight_P, token_P, order_P, place_P)
        return sum_per_token(rows_PD, place_P, token_P, pairs_per_token, num_tokens, weight_P)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_ND: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        rows_PD, weight_P, token_P, order_P, place_P = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_PD = grad_ND.index_select(0, token_P[order_P])
        grad_weight_P = (grad_PD * rows_PD).sum(1)[place_P]  # no matrix product, which autocast or TF32 would round
        return grad_PD.mul_(weight_P[order_P].unsqueeze(1)), grad_weight_P, None, None, None, None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x_ND: Tensor, token_P: Tensor, order_P: Tensor, pairs_per_token: int | None) -> Tensor:
        ctx.save_for_backward(token_P, order_P)
        ctx.sizes = pairs_per_token, x_ND.shape[0]  # type: ignore[attr-defined]
        return x_ND.index_select(0, token_P[order_P])

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_PD: Tensor) -> tuple[Tensor, None, None, None]:
        token_P, order_P = ctx.saved_tensors  # type: ignore[attr-defined]
        return sum_per_token(grad_PD, inverse(order_P), token_P, *ctx.sizes), None, None, None  # type: ignore[attr-defined]
