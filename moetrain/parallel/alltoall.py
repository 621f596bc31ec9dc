"""Expert parallelism: rows travel to the ranks that hold their experts, and back, by two all-to-alls each way.

N tokens, P pairs of this rank, R received rows, E experts, e experts of this rank, D hidden size. Wire order is `Placement.order`: rank by
rank, slot by slot; within an expert by token. The result does not depend on the placement.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moetrain.dist.comm import CountExchange, Exchange
from moetrain.dist.mesh import Axis
from moetrain.model.dispatch import Counts, Ticket, combine_pairs, inverse, permute, spread
from moetrain.routing.placement import Placement
from moetrain.routing.types import Routing


@dataclass
class Announcement:
    """Counts of all chunks on their way: mine in wire order, and the exchange that brings the others'."""

    sent_EC: Tensor
    exchange: CountExchange
    _landed: tuple[Tensor, Tensor, Tensor] | None = field(default=None, init=False)

    def land(self) -> tuple[Tensor, Tensor, Tensor]:
        """received_WC (W: experts of this rank, source rank by source rank), and both counts on the host. Waits the first time only."""
        if self._landed is None:
            received_WC = self.exchange.wait()
            on_host = torch.cat([self.sent_EC, received_WC]).cpu()  # the one wait for the device
            self._landed = received_WC, on_host[: len(self.sent_EC)], on_host[len(self.sent_EC) :]
        return self._landed


@dataclass
class AnnouncedCounts:
    """One chunk's column of an announcement."""

    announcement: Announcement
    chunk: int

    def land(self) -> tuple[Tensor, Tensor, Tensor]:
        """received_W on the device; sent_E and received_W on the host."""
        received_WC, sent_EC, on_host_WC = self.announcement.land()
        return received_WC[:, self.chunk], sent_EC[:, self.chunk], on_host_WC[:, self.chunk]


@dataclass
class AllToAllTicket:
    """One layer's exchange under way. `order_P`: pairs in wire order; `slot_R`: received rows in slot order (None: they stand so)."""

    routing: Routing
    num_tokens: int
    order_P: Tensor
    send_sizes: list[int]
    receive_sizes: list[int]
    count_e: Tensor
    slot_R: Tensor | None
    under_way: Exchange
    received_RD: Tensor | None = field(default=None)


class AllToAllDispatcher:
    """A `model.dispatch.Dispatcher` over the ep axis. Every rank of the axis makes the same calls in the same order, rows or none.

    Several tickets may be open; each is received, sent back and combined once.
    """

    def __init__(self, axis: Axis, placement: Placement) -> None:
        assert placement.num_ranks == axis.size, f"a placement over {placement.num_ranks} ranks on an axis of {axis.size}"
        device = axis.world.device
        self._axis = axis
        self._sizes = list(placement.sizes)
        self._num_local = placement.sizes[axis.index]
        self._order_E = torch.tensor(placement.order, device=device)
        self._wire_E = inverse(self._order_E)  # position of every expert in wire order
        self._slots = torch.arange(self._num_local, device=device).repeat(axis.size)

    def announce(self, routings: Sequence[Routing]) -> Sequence[AnnouncedCounts]:
        """Starts the exchange of counts, one for all chunks; returns at once."""
        sent_EC = torch.stack([routing.count_EL.sum(1) for routing in routings], 1)[self._order_E]
        receive_sizes = [self._num_local] * self._axis.size
        announcement = Announcement(sent_EC, CountExchange("expert counts", sent_EC, self._sizes, receive_sizes, self._axis))
        return [AnnouncedCounts(announcement, chunk) for chunk in range(len(routings))]

    def send(self, x_ND: Tensor, routing: Routing, counts: Counts) -> AllToAllTicket:
        """Sorts the rows, waits for counts, starts the rows and returns. x_ND must not change until `receive`."""
        assert isinstance(counts, AnnouncedCounts)
        order_P = torch.argsort(self._wire_E[routing.expert_P], stable=True)
        rows_PD = spread(x_ND, routing, order_P)  # before the counts are waited for
        received_W, sent_E, on_host_W = counts.land()
        send_sizes = [int(part.sum()) for part in sent_E.split(self._sizes)]
        count_re = on_host_W.view(self._axis.size, self._num_local)
        receive_sizes = count_re.sum(1).tolist()
        exchange = Exchange("rows to experts", rows_PD, send_sizes, receive_sizes, self._axis)
        slot_R = None
        if self._axis.size > 1:
            slot_R = torch.argsort(self._slots.repeat_interleave(received_W, output_size=sum(receive_sizes)), stable=True)
        return AllToAllTicket(routing, x_ND.shape[0], order_P, send_sizes, receive_sizes, count_re.sum(0), slot_R, exchange)

    def receive(self, ticket: Ticket) -> tuple[Tensor, Tensor]:
        """rows_RD by slot, then source rank, then token; count_e int64 on the host."""
        assert isinstance(ticket, AllToAllTicket)
        rows_RD = ticket.received_RD = ticket.under_way.wait()
        return rows_RD if ticket.slot_R is None else permute(rows_RD, ticket.slot_R, inverse(ticket.slot_R)), ticket.count_e

    def send_back(self, rows_RD: Tensor, ticket: Ticket) -> AllToAllTicket:
        """Starts the way back and returns. rows_RD must not change until `combine`."""
        assert isinstance(ticket, AllToAllTicket)
        back_RD = _tied(rows_RD, ticket.received_RD)
        if ticket.slot_R is not None:
            back_RD = permute(back_RD, inverse(ticket.slot_R), ticket.slot_R)
        ticket.received_RD = None
        ticket.under_way = Exchange("rows from experts", back_RD, ticket.receive_sizes, ticket.send_sizes, self._axis)
        return ticket

    def combine(self, ticket: Ticket) -> Tensor:
        """Waits. y_ND, the weighted sum per token."""
        assert isinstance(ticket, AllToAllTicket)
        return combine_pairs(ticket.under_way.wait(), ticket.routing, ticket.order_P, ticket.num_tokens)


def _tied(rows_RD: Tensor, received_RD: Tensor | None) -> Tensor:
    """Makes the backward exchanges run on every rank alike, whatever the experts did with no rows or with frozen weights."""
    if not torch.is_grad_enabled():
        return rows_RD
    assert received_RD is not None, "send_back comes after receive"
    if rows_RD.shape[0] == 0 and received_RD.requires_grad:
        return rows_RD + received_RD.sum()
    return rows_RD if rows_RD.requires_grad else rows_RD.detach().requires_grad_()
