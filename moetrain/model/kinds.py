"""The kinds of blocks, what they are made of, and where a configuration places them. No torch.

The main stream of a block is a list of computations; each adds its update to the residual stream. Gate and routed experts read the stream
in front of one of them (the shortcut tensor), and add theirs at the end of the block.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """One kind of block: `dense_attention` and `mlp` are the dense block that a pair holds, `attention` is its own."""

    layers: int  # attention layers; a pair of blocks has two
    stream: tuple[str, ...]  # main-stream computations in order
    leave: int = 0  # computations before the shortcut tensor; in a pair its position says it
    gatings: int = 1  # how often a token chooses experts

    @property
    def is_pair(self) -> bool:
        return self.layers == 2

    @property
    def has_shared(self) -> bool:
        return "shared" in self.stream

    @property
    def shares_norm(self) -> bool:
        """Whether the shared expert reads what the gate reads, so that one norm serves both."""
        return self.has_shared and not self.is_pair and self.stream.index("shared") == self.leave


KINDS = {
    "dense": Kind(1, ("attention", "mlp"), gatings=0),
    "moe": Kind(1, ("attention",), leave=1),
    "shared": Kind(1, ("attention", "shared"), leave=1),
    "shortcut": Kind(1, ("attention", "shared"), leave=0),
    "scmoe": Kind(2, ("dense_attention", "mlp", "attention", "shared")),
    "dgmoe": Kind(2, ("dense_attention", "mlp", "attention"), gatings=2),
}


@dataclass(frozen=True)
class Place:
    """One block of a model, as its configuration places it."""

    index: int  # blocks.{index}
    kind: Kind
    layer: int  # its first attention layer
    leave: int  # computations before the shortcut tensor
    bank: str | None  # the expert bank it uses; None: no experts

    @property
    def name(self) -> str:
        """Of a block with routed experts: that of its bank, if the bank is its own."""
        return f"blocks.{self.index}.moe.experts"

    @property
    def owns_bank(self) -> bool:
        return self.bank == self.name

    @property
    def before(self) -> tuple[str, ...]:
        """Computations before the shortcut tensor exists."""
        return self.kind.stream[: self.leave]

    @property
    def operators(self) -> tuple[str, ...]:
        """Computations after it: those that a schedule counts."""
        return self.kind.stream[self.leave :]
