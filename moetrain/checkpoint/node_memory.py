"""The memory of a node as one of its ranks uses it: two connections to the agent, and what the rank maps of its slots. No torch."""

import mmap
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from pathlib import Path
from threading import Lock

from moetrain.base.clock import Clock
from moetrain.base.log import logger
from moetrain.checkpoint.arena import NoRoom, map_slot, possible_bytes
from moetrain.checkpoint.job import Reply, SaveJob
from moetrain.checkpoint.patience import Patience
from moetrain.checkpoint.process import CALL_SECONDS, SILENCE_SECONDS, AgentDied, AgentLate, Connect, Link
from moetrain.checkpoint.wire import Refused
from moetrain.store.manifest import SaveId
from moetrain.store.objects import Superseded


class HungUp(AgentDied):
    """This rank has no connection to it at the moment, and makes none for what it asked."""


@dataclass(frozen=True)
class Needs:
    """What must stay in memory when room is made for a copy."""

    keep: SaveId | None = None  # the newest save that every rank has complete in memory, and whatever it refers to
    alone: bool = False  # nothing: the copy takes the place of all before it
    writing: Sequence[SaveId] = ()  # this rank's saves that are on their way to the store


class NodeMemory:
    """The memory of this node as one rank uses it. Two connections: copying must not wait for persisting.

    Training may have to wait for a copy. So an agent that was stopped is noticed within seconds while copies are made, and then left
    alone for a while, longer each time; one that works on a large copy has all of `CALL_SECONDS`.
    """

    def __init__(self, connect: Connect, rank: int, epoch: int, clock: Clock, checkpoint: Path = Path(), run: str = "") -> None:
        """`run`: as the `checkpoint` folder said when the epoch was claimed; "": not known."""
        self._connect, self._rank, self._epoch, self._checkpoint, self.run = connect, rank, epoch, checkpoint, run
        self._links: dict[str, Link] = {}
        self._locks = {"copy": Lock(), "persist": Lock()}
        self._maps: dict[str, mmap.mmap] = {}
        self._partner: dict | None = None
        self._patience = Patience(clock)

    def ask_again(self) -> None:
        """Before the last copy of all: an agent that did not answer is asked once more, however short a time ago that was."""
        with self._locks["copy"]:
            self._patience.answered()

    def reserve(self, save: SaveId, needs: Needs, sizes: Sequence[int]) -> dict[str, mmap.mmap]:
        """A slot for each size, by path, in order. Raises AgentDied, NoRoom, Superseded."""
        answer = self._copy({"op": "reserve", "save": save, "sizes": list(sizes)} | vars(needs))
        self._maps = {path: memory for path, memory in self._maps.items() if os.path.exists(path)}
        maps = {path: self._maps.get(path) or map_slot(path) for path in answer["slots"]}
        self._maps |= maps
        return maps

    def filled(self, job: SaveJob, slots: Sequence[str]) -> None:
        """The copy is complete; when this returns it outlives this process. Raises AgentDied, NoRoom for its description, Superseded."""
        self._copy({"op": "filled", "job": job.to_json(), "slots": list(slots)})

    def replicated(self, save: SaveId) -> tuple[bool, str]:
        """Whether the partner was sent this rank's part, and what went wrong. Raises AgentDied, of which HungUp after `leave`."""
        answer = self._copy({"op": "replicated", "save": save}, connects=False)
        return answer["done"], answer["trouble"]

    def persist(self, save: SaveId, parent: SaveId | None, ledger: dict, limit_seconds: float) -> Reply:
        """Waits until this rank's objects are durable, rank 0 for the commit. Raises AgentDied."""
        return Reply.of_json(self._call("persist", {"op": "persist", "save": save, "parent": parent, "ledger": ledger}, limit_seconds))

    def list(self) -> dict | None:
        """What lies in this node's memory, held until `went_on`; None without an agent and anything it could take over."""
        try:
            return self._call("copy", {"op": "list"}, start=False)
        except AgentDied:
            return None

    def went_on(self, save: SaveId | None) -> None:
        """After a recovery, once all ranks have read what they need: what this save in memory does not need belongs to the run no more.
        None: nothing there does."""
        with suppress(AgentDied):
            self._call("copy", {"op": "restored", "epoch": self._epoch, "keep": save}, start=False)

    @property
    def place(self) -> str:
        """The same for the ranks that have this node's memory in common."""
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/mnt')} {self._connect.folder}"

    def possible_bytes(self) -> int:
        """What the arena of this node could hold in all."""
        return possible_bytes([self._connect.folder, *self._connect.spare])

    def set_partner(self, address: dict) -> None:
        """The agent that gets copies of what this one has."""
        self._partner = address
        if "copy" in self._links:
            self._call("copy", {"op": "partner", "address": address})

    def address(self) -> dict | None:
        """Where other nodes reach the agent, which is started when there is none; None when that fails."""
        try:
            return self._call("copy", self._join)["address"]
        except AgentDied as died:
            logger("checkpoint").warning(f"No copies go to another node: {died}.")
            return None

    def leave(self, done: bool) -> None:
        """Ends the connections. `done`: nothing in memory is needed any more; the agent ends when all ranks have said so."""
        with self._locks["copy"]:
            if done and self._links:
                with suppress(AgentDied, Superseded):
                    self._answer("copy", {"op": "leave", "epoch": self._epoch}, CALL_SECONDS, start=False)
            for lane in list(self._links):
                self._drop(lane)

    def _copy(self, request: dict, connects: bool = True) -> dict:
        """A call that may hold up training."""
        with self._locks["copy"]:
            if not connects and "copy" not in self._links:
                raise HungUp("this rank has no connection to the agent any more")
            if (left := self._patience.seconds_left) and not self._connect.is_gone():
                raise AgentLate(f"the agent of this node does not answer; it is asked again in {left:.0f} s")
            try:
                found = self._answer("copy", request, CALL_SECONDS, silence_seconds=SILENCE_SECONDS)
            except AgentLate:
                self._patience.timed_out()
                raise
            self._patience.answered()
        return _accepted(found)

    def _call(self, lane: str, request: dict, limit_seconds: float = CALL_SECONDS, start: bool = True) -> dict:
        with self._locks[lane]:
            found = self._answer(lane, request, limit_seconds, start)
        return _accepted(found)

    def _answer(
        self, lane: str, request: dict, limit_seconds: float, start: bool = True, silence_seconds: float = inf, retries: int = 1
    ) -> dict:
        was_open = lane in self._links
        try:
            link = self._links.get(lane) or self._open(lane, start, silence_seconds)
            return link.call(request | {"rank": self._rank}, limit_seconds, silence_seconds)
        except TimeoutError:
            self._drop(lane)
            limits = f"{limit_seconds:g} s" + (f", or {silence_seconds:g} s without a sign of life" if silence_seconds < inf else "")
            raise AgentLate(f"the agent of this node took more than {limits}") from None
        except Refused as error:
            raise AgentDied(f"the agent of this node: {str(error).removesuffix('.')}") from error
        except OSError as error:
            self._drop(lane)
            if was_open:  # it ended since: another one takes over what it had, and knows when that is not enough
                return self._answer(lane, request, limit_seconds, start, silence_seconds, retries)
            if retries:  # it was about to end: it let nobody in any more, or hung up
                return self._answer(lane, request, limit_seconds, start, silence_seconds, retries - 1)
            raise AgentDied(f"the agent of this node ended ({error.strerror})") from error

    def _open(self, lane: str, start: bool, silence_seconds: float) -> Link:
        link = self._connect(start)
        if link is None:
            raise AgentDied("this node has no agent")
        self._links[lane] = link
        _accepted(link.call(self._join | {"rank": self._rank}, CALL_SECONDS, silence_seconds))
        if self._partner is not None:
            link.call({"op": "partner", "rank": self._rank, "address": self._partner}, CALL_SECONDS, silence_seconds)
        return link

    @property
    def _join(self) -> dict:
        return {"op": "join", "run": self.run, "epoch": self._epoch, "checkpoint": str(self._checkpoint)}

    def _drop(self, lane: str) -> None:
        if lane == "copy":  # the slots may be another agent's to give
            self._maps = {}
        link = self._links.pop(lane, None)
        if link is not None:
            link.close()


def _accepted(found: dict) -> dict:
    if "superseded" in found:
        raise Superseded(found["superseded"], "Stop one of the two jobs, or give them different run names.")
    if "full" in found:
        raise NoRoom(found["full"], found["hint"], found["is_passing"], found["is_empty"])
    return found
