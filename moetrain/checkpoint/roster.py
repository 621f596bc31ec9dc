"""What the ranks of a job tell each other before they train: who holds what, how much a copy may hold, whose agent is whose partner.

It is drawn up at a load, by the training thread; from then on it does not change, and the memory lane reads it.
"""

from moetrain.base.log import logger
from moetrain.checkpoint.config import CheckpointConfig
from moetrain.checkpoint.copying import parts_of, shown
from moetrain.checkpoint.course import Course, banks_of
from moetrain.checkpoint.fit import Fit, Share, fit
from moetrain.checkpoint.modes import Selection, is_derived
from moetrain.checkpoint.node_memory import NodeMemory
from moetrain.checkpoint.plan import Holding, holdings_of, merged, my_parts
from moetrain.checkpoint.process import AgentDied
from moetrain.checkpoint.recover import Gather, together
from moetrain.checkpoint.source import Memory
from moetrain.checkpoint.turns import Homes, homes_of
from moetrain.model.state import ModelState


class Roster:
    """One rank's view of the others."""

    def __init__(self, config: CheckpointConfig, rank: int, world: int, gather: Gather, memory: NodeMemory, course: Course) -> None:
        """`course`: hears which banks there are."""
        self.rank, self.world = rank, world
        self.holdings: list[Holding] | None = None  # of all ranks; None: not known yet
        self.homes: Homes | None = None
        self.copied_experts: int | None = None  # of every bank in one copy in memory; None: all
        self._beside: int | None = None  # in the largest that finds room beside the one before it; None: any does
        self._with_partner = config.agent.partner
        self._config, self._gather, self._memory, self._course = config, gather, memory, course

    def draw_up(self, state: ModelState) -> None:
        """Every rank calls it. Raises CheckpointError on every rank when there is no room for copies on one node."""
        self._meet(state)
        self._check_room(state)
        self._find_partner()

    def draw_up_alone(self, state: ModelState) -> None:
        """One process needs no load to know who holds what: the memory lane's thread calls it before a first save without one."""
        if self.holdings is None and self.world == 1:
            self._meet(state)

    def look_around(self, at: str) -> Memory:
        """What lies in the memory of all nodes of this job. Agents that an earlier start left are asked; none is started for it."""
        if at not in ("auto", "must"):
            return Memory([], None)
        found: list[dict | None] = []

        def listed() -> str:  # inside `together`: a rank that fails must not leave the others waiting
            found.append(self._memory.list())
            return _fingerprint(found[0])

        prints = together(listed, self._gather)
        own = found[0]
        if len(set(prints)) == 1 or len(prints) != self.world:  # all see the same, or a `gather` that brings rank 0's answer only
            return Memory([own] if own else [], own)
        answers = self._gather(own if prints.index(prints[self.rank]) == self.rank else None)
        return Memory([answer for answer in answers if isinstance(answer, dict)], own)

    def _meet(self, state: ModelState) -> None:
        """Every rank learns who holds what, so that from now on all divide a save alike without asking."""
        answers = self._gather([holding.to_json() for holding in holdings_of(parts_of(shown(state, self._config.mode)))])
        if len(answers) == self.world:  # a `gather` that brings rank 0's answer only tells nothing
            said = [[Holding.of_json(found) for found in answer] for answer in answers if isinstance(answer, list)]
            self.holdings = merged(said)
            self.homes = homes_of(self.holdings)
            self._course.knows(banks_of(holding.group for holding in self.holdings if holding.group))

    def finds_room(self, in_memory: Selection | None) -> bool:
        """Whether a copy of these experts (None: all) fits beside the one before it."""
        if self._beside is None:
            return True
        return in_memory is not None and max(map(len, in_memory.values()), default=0) <= self._beside

    def found_no_room(self, in_memory: Selection | None) -> None:
        """A copy of these experts did not fit though it should have: what ranks hold is not cut as evenly as `fit` takes it. Rank 0."""
        num_experts = max(self._course.known_banks.values(), default=0)
        if not num_experts:
            return
        size = num_experts if in_memory is None else max(map(len, in_memory.values()), default=0)
        self._beside = size // 2 if size else -1
        self.copied_experts = max(self._beside, min(self._config.experts_per_save, num_experts))
        sentence = (
            "A node had no room for a copy of %d experts of a layer; from here on one holds %d, or takes the place of the one before it."
        )
        logger("checkpoint").warning(sentence, size, self.copied_experts)

    def _check_room(self, state: ModelState) -> None:
        """Decides before training what a copy holds. Raises CheckpointError on every rank when there is no room on one node."""
        config, num_experts = self._config, max(self._course.known_banks.values(), default=0)
        shares = [Share(*found) for found in self._gather(self._share(state)) if isinstance(found, list)]
        found = fit(shares, num_experts, config.snapshot_experts, config.experts_per_save, config.agent.partner)
        self.copied_experts = found.copied if found.copied < num_experts else None
        self._beside = found.beside if found.beside < num_experts else None
        self._with_partner = found.with_partner
        if self.rank == 0:
            self._tell(found, num_experts, len({share.place for share in shares}))

    def _share(self, state: ModelState) -> list:
        """`Share` as JSON: what this rank would copy of everybody, and of those that are not selected."""
        parts = parts_of(shown(state, self._config.mode))
        nobody: Selection = {holding.group[0]: [] for holding in self.holdings or holdings_of(parts) if holding.group}
        whole, least = (my_parts(parts, self.rank, self._config.mode, selection, self.holdings) for selection in (None, nobody))
        shared = sum(part.num_bytes for part in whole if not part.tensor.group)
        experts = sum(part.num_bytes for part in whole if part.tensor.group)
        rounded = sum(part.num_bytes for part in least if is_derived(part.tensor))
        every = sum(part.num_bytes for part in least if part.tensor.group) - rounded
        return [self._memory.place, shared, experts, every, rounded, self._memory.possible_bytes()]

    def _tell(self, found: Fit, num_experts: int, num_nodes: int) -> None:
        log = logger("checkpoint")
        if found.copied < num_experts:
            sentence = "A copy in memory holds %d of the %d experts of a layer; a fault takes the others back to older copies."
            log.info(sentence, found.copied, num_experts)
        if found.beside < found.copied:
            log.warning("There is no room for two copies in memory: each takes the place of the one before it while it is made.")
        elif found.beside < num_experts:
            log.info("Full checkpoints take the place of the copy in memory while they are made: there is no room for two of them.")
        if self._config.agent.partner and num_nodes > 1 and not found.with_partner:
            log.warning("No copies go to another node: there is no room for them beside a node's own.")

    def _find_partner(self) -> None:
        """With several nodes every agent gets the next one as its partner, in a ring."""
        places = self._gather(self._memory.place) if self._with_partner else []
        if len(set(map(str, places))) < 2:
            return
        addresses = together(self._memory.address, self._gather)
        nodes = [address for number, address in enumerate(addresses) if address not in addresses[:number]]
        if None in nodes or len(nodes) < 2:
            return
        partner = nodes[(nodes.index(addresses[self.rank]) + 1) % len(nodes)]
        assert isinstance(partner, dict)
        try:
            self._memory.set_partner(partner)
        except AgentDied as died:
            logger("checkpoint").warning(f"No copies go to another node: {died}.")


def _fingerprint(found: dict | None) -> str:
    """The same for ranks that had the same answer of the same agent."""
    parts = [(one["job"]["save"], one["job"]["rank"], len(one["held"])) for one in found["generations"]] if found else []
    return f"{found['folder']} {found['address']} {parts}" if found else ""
