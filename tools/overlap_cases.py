"""What tools/bench_overlap.py compares: block pairs of one size, their opponents, the arms they run in, and the links they meet on.

Every model has the same attention, the same dense MLP in the first block of a pair, and the same width of every expert; what differs is
how many experts a token takes, and when. A shared expert and one routed expert cost what two routed experts do.
"""

from dataclasses import dataclass

from moetrain.model.config import AttentionConfig, ModelConfig, ShortcutConfig
from moetrain.routing.config import RoutingConfig

NUM_WORDS = 2048
INIT_STD = 0.05  # large enough that every path shows in the output
TOP_2, TOP_1, SHARED = "top-2", "top-1", "shared expert"
POSITIONS = {"ScMoE Pos-1": 1, "ScMoE Pos-2": 2, "ScMoE Pos-3": 3}
SCMOE = "ScMoE Pos-2"
MODELS = (TOP_2, TOP_1, SHARED, *POSITIONS)
DEEPSPEED = "DeepSpeed top-2"

# Arms. A serial exchange ends before anything else begins; a null one is a local copy of as many bytes.
SERIAL, OVERLAPPED, NULL, EXCHANGE = "S", "O", "N", "C"
STOCK = "stock"  # serial, by all_to_all_single
REST = "rest"  # attention and dense MLPs only: what is no MoE


@dataclass(frozen=True)
class Size:
    """Tokens are those of one rank. A message between two ranks is at least a MiB: the link's burst is a small part of it."""

    hidden: int = 256
    ffn: int = 1056
    experts: int = 8
    sequences: int = 8
    seq_len: int = 256
    pairs: int = 1

    @property
    def tokens(self) -> int:
        return self.sequences * self.seq_len


SMALL = Size(hidden=16, ffn=24, experts=4, sequences=1, seq_len=16)


@dataclass(frozen=True)
class Point:
    """A link and the size to begin with. `share`: what part of top-2's MoE time its exchanges shall take; `over_window`: how many times as
    long as their window ScMoE's shall take. The FFN is made as wide as this machine needs for the one that is given; without either the
    size is as it is. rate "": the link is not limited.
    """

    rate: str
    share: float | None
    size: Size = Size()
    over_window: float | None = None


POINTS = {
    "60": Point("200mbit", 0.60),
    "75": Point("100mbit", 0.75),
    "85": Point("50mbit", 0.85),
    "15": Point("200mbit", 0.15, Size(ffn=8960)),  # more arithmetic a byte; a faster link would make the CPU the link
    "window": Point("50mbit", None, Size(ffn=1792, sequences=16), over_window=2.0),
    "unlimited": Point("", None),
}


@dataclass(frozen=True)
class Run:
    """One thing timed. `slots` as in moetrain.model.schedule: an entry for every token chunk."""

    model: str
    arm: str
    slots: tuple[int, ...] = (1,)
    again: bool = False  # the same as another one: how far two medians of one thing differ

    @property
    def name(self) -> str:
        slots = "" if self.arm in (EXCHANGE, REST, STOCK) else " " + "+".join(map(str, self.slots))
        return f"{self.model} {self.arm}{slots}{' again' if self.again else ''}"


def num_operators(model: str) -> int:
    """Main-stream computations after the tensor that the experts read exists."""
    return POSITIONS[model] + 1 if model in POSITIONS else int(model == SHARED)


def model_of(model: str, size: Size) -> ModelConfig:
    """Blocks only: the vocabulary is a token of it. Raises KeyError for a name that is none of MODELS."""
    pattern = {TOP_2: ["dense", "moe"], TOP_1: ["dense", "moe"], SHARED: ["dense", "shared"]} | {key: ["scmoe"] for key in POSITIONS}
    heads = max(2, size.hidden // 64)
    top_k = 2 if model == TOP_2 else 1
    config = ModelConfig(
        vocab_size=1, hidden_size=size.hidden, num_layers=2 * size.pairs, pattern=pattern[model], ffn_size=size.ffn,
        expert_ffn_size=size.ffn, shared_ffn_size=size.ffn, max_position=size.seq_len, init_std=INIT_STD,
        attention=AttentionConfig(num_heads=heads, num_kv_heads=heads, head_dim=size.hidden // heads),
        routing=RoutingConfig(num_experts=size.experts, top_k=top_k, renormalize=top_k > 1),
        shortcut=ShortcutConfig(positions=[POSITIONS.get(model, 2)]),
    )  # fmt: skip
    config.check()
    return config


def opponents() -> list[Run]:
    """What stands beside ScMoE, each at its best; and the arms that say what could be gained."""
    return [
        Run(TOP_2, SERIAL),
        Run(TOP_2, SERIAL, again=True),
        Run(TOP_2, NULL),
        Run(TOP_2, EXCHANGE),
        Run(TOP_2, REST),
        *(Run(TOP_2, OVERLAPPED, (1,) * chunks) for chunks in (2, 4)),
        Run(TOP_1, SERIAL),
        Run(TOP_1, NULL),
        Run(SHARED, SERIAL, (2,)),
        Run(SHARED, NULL, (2,)),
        *(Run(SHARED, OVERLAPPED, slots) for slots in ((1,), (2,), (1, 2))),
        Run(SCMOE, SERIAL, (3,)),
        Run(SCMOE, NULL, (3,)),
        Run(SCMOE, EXCHANGE),
        *(Run(SCMOE, OVERLAPPED, slots) for slots in ((2,), (3,), (2, 3))),
    ]


def core() -> list[Run]:
    """Of the opponents those that a point of long laps cannot do without."""
    in_chunks = {Run(TOP_2, OVERLAPPED, (1, 1)), Run(TOP_2, OVERLAPPED, (1, 1, 1, 1))}
    left_out = in_chunks | {Run(SHARED, OVERLAPPED, (1,)), Run(SCMOE, OVERLAPPED, (2,))}
    return [run for run in opponents() if run not in left_out]


def share() -> list[Run]:
    """What says how much of top-2's MoE time is exchange."""
    return [Run(TOP_2, SERIAL), Run(TOP_2, EXCHANGE), Run(TOP_2, REST)]


def over_window() -> list[Run]:
    """What says how long ScMoE's exchanges are beside their window."""
    return [Run(SCMOE, SERIAL, (3,)), Run(SCMOE, NULL, (3,)), Run(SCMOE, EXCHANGE)]


def hiding() -> list[Run]:
    """ScMoE alone, so that many rounds are short."""
    return [
        Run(SCMOE, SERIAL, (3,)),
        Run(SCMOE, NULL, (3,)),
        Run(SCMOE, EXCHANGE),
        *(Run(SCMOE, OVERLAPPED, slots) for slots in ((3,), (2, 3))),
    ]


def positions() -> list[Run]:
    """The three positions at their likely slots, beside top-2."""
    best = {"ScMoE Pos-1": ((2,), (1, 2)), SCMOE: ((2,), (3,)), "ScMoE Pos-3": ((3,), (4,))}
    return [Run(TOP_2, SERIAL), *(Run(model, OVERLAPPED, slots) for model, choices in best.items() for slots in choices)]


def peers() -> list[Run]:
    """DeepSpeed's MoE layer with our transport and with its own, and ours with the stock transport."""
    return [
        Run(DEEPSPEED, SERIAL),
        Run(DEEPSPEED, STOCK),
        Run(TOP_2, SERIAL),
        Run(TOP_2, STOCK),
        *(Run(SCMOE, OVERLAPPED, slots) for slots in ((2,), (3,))),
    ]


def chunked(most: int = 4) -> list[Run]:
    """ScMoE with every schedule of equal slots, and chunks spread over two neighbouring ones."""
    last = num_operators(SCMOE) + 1
    slots = {(slot,) * chunks for slot in range(1, last + 1) for chunks in (1, 2, most)}
    slots |= {(slot, slot + 1) for slot in range(1, last)} | {(slot, slot, slot + 1, slot + 1) for slot in range(1, last)}
    return [Run(SCMOE, NULL, (3,)), Run(SCMOE, EXCHANGE), *(Run(SCMOE, OVERLAPPED, one) for one in sorted(slots))]


GROUPS = {
    "opponents": opponents, "core": core, "share": share, "window": over_window, "hiding": hiding, "positions": positions, "peers": peers,
    "schedules": chunked,
}  # fmt: skip
