"""The shape of a model as configuration: everything a bundle must carry to compute the same function. No torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass
from typing import TypeVar, get_type_hints

from moetrain.base.errors import ConfigError, closest, one_of
from moetrain.model.kinds import KINDS, Place
from moetrain.routing.config import RoutingConfig

QK_NORMS = ("none", "full", "head")
ROPE_SCALINGS = ("none", "linear", "llama3", "yarn")
SHARED_GATES = {"add": 0, "cg1": 1, "cg2": 2}  # rows of the gate
Config = TypeVar("Config")


@dataclass
class AttentionConfig:
    """Grouped-query attention."""

    num_heads: int = 4  # query heads
    num_kv_heads: int = 4  # key and value heads; divides num_heads
    head_dim: int = 64  # per head; num_heads * head_dim need not equal hidden_size
    qk_norm: str = "none"  # RMSNorm of queries and keys: none | full (over all heads together) | head (per head)
    qkv_clip: float | None = None  # clamp queries, keys and values to [-x, x]; null = off
    bias: bool = False  # biases on the four projections
    sliding_window: int | None = None  # a token sees itself and the window - 1 tokens before it; null = all


@dataclass
class RopeConfig:
    """Rotary position embedding, arXiv 2104.09864, half-split convention, over the whole head_dim."""

    theta: float = 10000.0  # base of the wavelengths
    scaling: str = "none"  # none | linear | llama3 | yarn
    factor: float = 1.0  # how much longer than the original context
    original_max_position: int = 0  # context before scaling (llama3, yarn)
    low_frequency_factor: float = 1.0  # llama3: wavelengths above original_max_position / this are stretched
    high_frequency_factor: float = 4.0  # llama3: wavelengths below original_max_position / this are kept
    beta_fast: float = 32.0  # yarn: dims that turn more often over the original context are kept
    beta_slow: float = 1.0  # yarn: dims that turn less often are interpolated
    attention_factor: float | None = None  # yarn: multiplies cos and sin; null = 0.1 ln(factor) + 1


@dataclass
class ShortcutConfig:
    """Pairs of ScMoE and DGMoE, arXiv 2404.05019: which tensor feeds gate and experts, and who shares experts."""

    positions: list[int] = field(default_factory=lambda: [2])  # per pair (1: output, 2: post-attention, 3: input); the last goes on
    distinct: bool = True  # dgmoe: a token's second choice leaves out the experts of its first
    pairs_per_bank: int = 1  # dgmoe: consecutive pairs served by one MoE module (DGMoE-Share: 2)


@dataclass
class ModelConfig:
    """A decoder-only transformer. `pattern` is repeated until `num_layers` layers are filled."""

    vocab_size: int = 4096  # embeddings; at least the tokens of the corpus
    hidden_size: int = 256  # width of the residual stream
    num_layers: int = 4  # attention layers
    pattern: list[str] = field(default_factory=lambda: ["scmoe"])  # dense | moe | shared | shortcut | scmoe, dgmoe (pairs: two layers)
    ffn_size: int = 704  # SwiGLU width of dense blocks
    expert_ffn_size: int = 704  # SwiGLU width of one routed expert
    shared_ffn_size: int = 704  # SwiGLU width of one shared expert (blocks shared, shortcut, scmoe)
    num_shared_experts: int = 1  # shared experts; together they are one SwiGLU of their summed width
    shared_gate: str = "cg1"  # add | cg1: a sigmoid on the shared experts | cg2: a softmax over shared and routed (arXiv 2404.05019)
    max_position: int = 256  # longest context trained
    norm_eps: float = 1e-5  # added to the mean square in every RMSNorm
    tie_embeddings: bool = True  # the output projection is the embedding
    init_std: float = 0.02  # output projections: init_std / sqrt(2 num_layers)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    rope: RopeConfig = field(default_factory=RopeConfig)
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    shortcut: ShortcutConfig = field(default_factory=ShortcutConfig)

    @classmethod
    def from_dict(cls, values: Mapping[str, object], key: str = "model") -> "ModelConfig":
        """The inverse of `dataclasses.asdict`; absent keys take their defaults. ConfigError: unknown key, wrong type, broken rule."""
        config = _filled(cls, values, key)
        config.check(key)
        return config

    def blocks(self) -> list[str]:
        """The block list: `pattern` repeated to num_layers layers; a pair takes two. ConfigError if it does not fit."""
        blocks: list[str] = []
        layers = 0
        while layers < self.num_layers:
            block = self.pattern[len(blocks) % len(self.pattern)]
            blocks.append(block)
            layers += KINDS[block].layers
        if layers != self.num_layers:
            rule = f"the pattern {self.pattern} cannot fill it exactly (a pair takes two layers)"
            raise ConfigError.of("model.num_layers", self.num_layers, rule, f"Use {layers} or {layers - 2}.")
        return blocks

    def places(self) -> list[Place]:
        """Every block with its first layer, its shortcut and its bank."""
        blocks, positions = self.blocks(), self.shortcut.positions
        pairs = [index for index, block in enumerate(blocks) if KINDS[block].is_pair]
        sharing = [index for index, block in enumerate(blocks) if block == "dgmoe"]
        places: list[Place] = []
        for index, block in enumerate(blocks):
            kind, owner = KINDS[block], index
            if index in sharing:
                number = sharing.index(index)
                owner = sharing[number - number % self.shortcut.pairs_per_bank]
            leave = 3 - positions[min(pairs.index(index), len(positions) - 1)] if kind.is_pair else kind.leave
            layer = places[-1].layer + places[-1].kind.layers if places else 0
            places.append(Place(index, kind, layer, leave, f"blocks.{owner}.moe.experts" if kind.gatings else None))
        return places

    def banks(self) -> list[str]:
        """Names of the expert banks: `blocks.3.moe.experts`, by the first block that uses each."""
        return [place.name for place in self.places() if place.owns_bank]

    def gatings_per_bank(self) -> list[int]:
        """How often a token chooses experts of each bank in a forward, in the order of `banks`; `routing.top_k` each time."""
        places = self.places()
        return [sum(place.kind.gatings for place in places if place.bank == bank) for bank in self.banks()]

    def num_gatings(self) -> int:
        """Of all banks together."""
        return sum(self.gatings_per_bank())

    def check(self, key: str = "model") -> None:
        """Raises ConfigError at the first broken rule."""
        if not self.pattern:
            raise ConfigError.of(f"{key}.pattern", self.pattern, "it must name at least one block", f"Blocks: {', '.join(KINDS)}.")
        for block in self.pattern:
            one_of(f"{key}.pattern", block, KINDS)
        positive = {
            name: getattr(self, name)
            for name in (
                "vocab_size",
                "hidden_size",
                "num_layers",
                "ffn_size",
                "expert_ffn_size",
                "shared_ffn_size",
                "num_shared_experts",
                "max_position",
                "norm_eps",
                "init_std",
            )
        }
        positive |= {f"attention.{name}": getattr(self.attention, name) for name in ("num_heads", "num_kv_heads", "head_dim")}
        positive |= {"rope.theta": self.rope.theta, "rope.factor": self.rope.factor}
        for name, value in positive.items():
            if not 0 < value < math.inf:
                raise ConfigError.of(f"{key}.{name}", value, "it must be positive")
        self.blocks()
        attention, rope = self.attention, self.rope
        if attention.num_heads % attention.num_kv_heads:
            raise ConfigError.of(f"{key}.attention.num_kv_heads", attention.num_kv_heads, f"it must divide num_heads={attention.num_heads}")
        if attention.head_dim % 2:
            raise ConfigError.of(f"{key}.attention.head_dim", attention.head_dim, "rotary embedding needs an even head_dim")
        one_of(f"{key}.attention.qk_norm", attention.qk_norm, QK_NORMS)
        one_of(f"{key}.shared_gate", self.shared_gate, SHARED_GATES)
        one_of(f"{key}.rope.scaling", rope.scaling, ROPE_SCALINGS)
        if attention.qkv_clip is not None and not 0 < attention.qkv_clip < math.inf:
            raise ConfigError.of(f"{key}.attention.qkv_clip", attention.qkv_clip, "it must be positive", "Use null for off.")
        if attention.sliding_window is not None and attention.sliding_window < 1:
            raise ConfigError.of(f"{key}.attention.sliding_window", attention.sliding_window, "it must be at least 1, or null")
        if rope.scaling in ("llama3", "yarn") and rope.original_max_position < 1:
            rule = f"rope.scaling={rope.scaling} needs the context length before scaling"
            raise ConfigError.of(f"{key}.rope.original_max_position", rope.original_max_position, rule)
        self._check_pairs(key)
        self._check_shared(key)
        self.routing.check(f"{key}.routing")

    def _check_pairs(self, key: str) -> None:
        shortcut, blocks = self.shortcut, self.blocks()
        num_pairs, num_double = sum(KINDS[block].is_pair for block in blocks), blocks.count("dgmoe")
        if not shortcut.positions or any(position not in (1, 2, 3) for position in shortcut.positions):
            rule = "it must name positions 1, 2 or 3 (arXiv 2404.05019 section 3.1)"
            raise ConfigError.of(f"{key}.shortcut.positions", shortcut.positions, rule)
        if len(shortcut.positions) > max(num_pairs, 1):
            raise ConfigError.of(f"{key}.shortcut.positions", shortcut.positions, f"the model has {num_pairs} pairs")
        if not num_pairs and shortcut.positions != ShortcutConfig().positions:
            raise ConfigError.of(f"{key}.shortcut.positions", shortcut.positions, "the model has no pair", f"Add scmoe to {key}.pattern.")
        if shortcut.pairs_per_bank < 1:
            raise ConfigError.of(f"{key}.shortcut.pairs_per_bank", shortcut.pairs_per_bank, "it must be at least 1")
        for name, value, usual in (("pairs_per_bank", shortcut.pairs_per_bank, 1), ("distinct", shortcut.distinct, True)):
            if not num_double and value != usual:
                raise ConfigError.of(f"{key}.shortcut.{name}", value, "the model has no dgmoe pair", f"Add dgmoe to {key}.pattern.")
        if num_double and shortcut.distinct and 2 * self.routing.top_k > self.routing.num_experts:
            rule = f"dgmoe chooses twice, and {self.routing.num_experts} experts cannot be different for both choices"
            raise ConfigError.of(f"{key}.routing.top_k", self.routing.top_k, rule, f"Use {key}.shortcut.distinct=false.")

    def _check_shared(self, key: str) -> None:
        """Widths are not asked about: whoever makes a model smaller sets all of them, whatever its blocks."""
        if any(KINDS[block].has_shared for block in self.blocks()):
            return
        way_out = f"Add {' or '.join(name for name, kind in KINDS.items() if kind.has_shared)} to {key}.pattern, or leave the key out."
        for name, value, usual in (("shared_gate", self.shared_gate, "cg1"), ("num_shared_experts", self.num_shared_experts, 1)):
            if value != usual:
                raise ConfigError.of(f"{key}.{name}", value, "no block of the model has a shared expert", way_out)


def fits_grouped_mm(hidden_size: int, ffn_size: int, value_bytes: int) -> bool:
    """torch's grouped matmul asks for rows of whole 16 bytes."""
    return hidden_size * value_bytes % 16 == 0 and ffn_size * value_bytes % 16 == 0


def _filled(cls: type[Config], values: Mapping[str, object], key: str) -> Config:
    """An instance of the dataclass `cls` (and of those it holds) from plain data."""
    hints = get_type_hints(cls)
    for name in values:
        if name not in hints:
            raise ConfigError.of(f"{key}.{name}", values[name], "there is no such key", closest(name, hints))
    return cls(**{name: _value(hints[name], value, f"{key}.{name}") for name, value in values.items()})


def _value(hint: type, value: object, key: str) -> object:
    if is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError.of(key, value, "it must be a group of keys")
        return _filled(hint, value, key)
    for of_list, each, words in ((list[str], str, "a list of words"), (list[int], int, "a list of whole numbers")):
        if hint == of_list:
            if not isinstance(value, list) or not all(type(item) is each for item in value):
                raise ConfigError.of(key, value, f"it must be {words}")
            return list(value)
    if type(value) is int and hint in (float, float | None):
        return float(value)
    # bool is an int to isinstance: True is no number of layers.
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError.of(key, value, f"its type must be {hint.__name__ if isinstance(hint, type) else hint}")
    return value
