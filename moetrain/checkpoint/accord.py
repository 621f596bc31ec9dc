"""How ranks agree about a save without a collective: rank 0 says on the board what each save is, everyone says how it went. No torch.

Texts under fixed keys, each replaced by the next save's: what rank 0 decided, and of every rank the newest save that it has READY, the
newest that it left out, and the newest for which it had no room. A board that is lost means that nobody hears a decision, so nothing is
copied and nothing is given away.
"""

import json
from dataclasses import asdict, dataclass, field

from moetrain.base.clock import Clock
from moetrain.checkpoint.modes import Selection
from moetrain.dist.board import Board
from moetrain.store.manifest import SaveId

POLL_SECONDS, LONGEST_POLL_SECONDS = 0.001, 0.1


@dataclass(frozen=True)
class Decision:
    """What a save is, the same for every rank. `skip`: why there is none."""

    save: SaveId
    skip: str = ""
    keep: SaveId | None = None  # the newest save that all ranks have in memory
    alone: bool = False  # the copy takes the place of all before it
    persists: bool = True
    index: int = 0
    selection: Selection | None = None  # experts that go to the store
    in_memory: Selection | None = None  # experts that are copied
    ledger: dict = field(default_factory=dict)  # as the copies hold it
    is_heard: bool = True

    def to_text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def of_text(cls, text: str) -> "Decision":
        found = json.loads(text)
        return cls(**found | {"save": SaveId(*found["save"]), "keep": found["keep"] and SaveId(*found["keep"])})


class Accord:
    """One rank's voice and ear. Used by one thread at a time, but for `ready`."""

    def __init__(self, board: Board, prefix: str, rank: int, world: int, clock: Clock) -> None:
        """`prefix`: of its keys, of this checkpointer alone."""
        self._board, self._rank, self._world, self._clock = board, rank, world, clock
        self._prefix = prefix
        self._said = {"ready": SaveId(0, 0), "left_out": SaveId(0, 0), "no_room": SaveId(0, 0)}

    def ready(self, save: SaveId) -> None:
        """This rank's part of the save lies in memory, at the partner too."""
        self._say("ready", save)

    def leave_out(self, save: SaveId, no_room: bool = False) -> None:
        """This rank's part will never be in memory. `no_room`: because it fits nowhere beside what is there."""
        self._say("left_out", save, *(["no_room"] if no_room else []))

    def _say(self, word: str, save: SaveId, *more: str) -> None:
        for one in (word, *more):
            self._said[one] = max(self._said[one], save)
        self._board.post(f"{self._prefix}/{self._rank}", json.dumps(self._said))

    def decide(self, decision: Decision) -> None:
        """Rank 0 only."""
        self._board.post(f"{self._prefix}/decision", decision.to_text())

    def hear(self, save: SaveId, patience_seconds: float) -> Decision | None:
        """What rank 0 decided about this save; None when nothing is heard, or rank 0 is further on already."""
        key = f"{self._prefix}/decision"
        deadline, pause = self._clock.monotonic() + patience_seconds, POLL_SECONDS
        while True:
            text = self._board.read([key]).get(key)
            if text is not None and (decision := Decision.of_text(text)).save >= save:
                return decision if decision.save == save else None
            if self._clock.monotonic() > deadline:
                return None
            self._clock.sleep(pause)
            pause = min(2 * pause, LONGEST_POLL_SECONDS)

    def lacked_room(self, save: SaveId) -> bool:
        """Rank 0: whether a rank left this save out for want of room."""
        said = self._board.read([f"{self._prefix}/{rank}" for rank in range(self._world)])
        return any(SaveId(*json.loads(text)["no_room"]) == save for text in said.values())

    def is_complete(self, save: SaveId, patience_seconds: float) -> bool | None:
        """Rank 0: whether every rank has this save READY. False: one of them never will; None: not known within the patience."""
        keys = [f"{self._prefix}/{rank}" for rank in range(self._world)]
        deadline, pause = self._clock.monotonic() + patience_seconds, POLL_SECONDS
        while True:
            said = [json.loads(text) for text in self._board.read(keys).values()]
            ready = [SaveId(*one["ready"]) == save for one in said]
            if len(said) == self._world and all(ready):
                return True
            if any(_will_not(one, save) for one in said):
                return False
            if self._clock.monotonic() > deadline:
                return None
            self._clock.sleep(pause)
            pause = min(2 * pause, LONGEST_POLL_SECONDS)


def _will_not(said: dict, save: SaveId) -> bool:
    """Of a newer save that is left out nothing follows: this one may still be on its way to the partner."""
    return SaveId(*said["left_out"]) == save or SaveId(*said["ready"]) > save
