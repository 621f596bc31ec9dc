"""Every kind of block written plainly from its equations (docs/scmoe.md), in float64 and with loops: the oracle of the model's tests.

Parameters come by name as docs/design.md says; nothing of `moetrain.model` computes here.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import silu

from moetrain.model.config import ModelConfig

PAIRS = ("scmoe", "dgmoe")


@dataclass
class Plain:
    """A model by its equations. `auxiliary` collects the balance loss of every gating by bank, as sums over tokens."""

    config: ModelConfig
    values: dict[str, Tensor]
    auxiliary: dict[str, list[Tensor]] = field(default_factory=dict)
    choices: list[list[set[int]]] = field(default_factory=list)  # of every gating: the experts of every token

    def logits(self, tokens_BS: Tensor) -> Tensor:
        h = self.values["embedding.weight"][tokens_BS]
        pairs = double = 0
        for index, block in enumerate(self.config.blocks()):
            position = self.config.shortcut.positions[min(pairs, len(self.config.shortcut.positions) - 1)]
            owner = index
            if block == "dgmoe":
                owner = index - double % self.config.shortcut.pairs_per_bank  # in a model of nothing else
                double += 1
            pairs += block in PAIRS
            h = self.block(block, f"blocks.{index}", f"blocks.{owner}.moe", position, h)
        return self.norm(h, "final_norm.weight") @ self.values["embedding.weight"].T

    def block(self, block: str, at: str, moe: str, position: int, h: Tensor) -> Tensor:
        if block in PAIRS:
            entering = h
            after_attention = entering + self.attention(f"{at}.dense.attention", entering)
            leaving = after_attention + self.mlp(f"{at}.dense.mlp", after_attention)
            shortcut = {1: leaving, 2: after_attention, 3: entering}[position]
            h = leaving + self.attention(f"{at}.attention", leaving)
        else:
            shortcut = h
            h = h + self.attention(f"{at}.attention", h)
            if block == "dense":
                return h + self.mlp(f"{at}.mlp", h)
            if block != "shortcut":
                shortcut = h
        x = self.norm(shortcut, f"{moe}.norm.weight")
        routed, chosen = self.routed(moe, x, None)
        if block == "moe":
            return h + routed
        if block == "dgmoe":
            taken = chosen if self.config.shortcut.distinct else None
            return h + routed + self.routed(moe, self.norm(h, f"{moe}.norm.weight"), taken)[0]
        seen = x if block == "shared" else self.norm(h, f"{moe}.shared.norm.weight")
        shared = self.swiglu(seen, self.values[f"{moe}.shared.gate_up_proj.weight"], self.values[f"{moe}.shared.down_proj.weight"])
        if self.config.shared_gate == "add":
            return h + shared + routed
        gate = seen @ self.values[f"{moe}.shared_gate.weight"].T
        if self.config.shared_gate == "cg1":
            return h + shared / (1 + torch.exp(-gate)) + routed
        of_shared, of_routed = torch.exp(gate[..., :1]), torch.exp(gate[..., 1:])
        return h + (of_shared * shared + of_routed * routed) / (of_shared + of_routed)

    def routed(self, moe: str, x_BSD: Tensor, taken: list[set[int]] | None) -> tuple[Tensor, list[set[int]]]:
        """Each token's chosen experts, weighted by their probability over all; and which they are."""
        routing = self.config.routing
        x = x_BSD.flatten(0, 1)
        probability = torch.softmax(x @ self.values[f"{moe}.router.weight"].T, 1)
        rows, chosen = [], list[set[int]]()
        for token in range(len(x)):
            order = torch.argsort(probability[token], descending=True).tolist()
            free = [expert for expert in order if taken is None or expert not in taken[token]]
            chosen.append(set(free[: routing.top_k]))
            parts = [probability[token, expert] * self.expert(moe, expert, x[token]) for expert in free[: routing.top_k]]
            rows.append(torch.stack(parts).sum(0))
        share = torch.tensor([sum(expert in of_token for of_token in chosen) for expert in range(routing.num_experts)]).double()
        balance = routing.num_experts * (share / (len(x) * routing.top_k) * probability.sum(0)).sum()
        self.auxiliary.setdefault(moe, []).append(balance)
        self.choices.append(chosen)
        return torch.stack(rows).view(x_BSD.shape), chosen

    def expert(self, moe: str, expert: int, x: Tensor) -> Tensor:
        return self.swiglu(x, self.values[f"{moe}.experts.gate_up_proj"][expert], self.values[f"{moe}.experts.down_proj"][expert])

    def mlp(self, at: str, h: Tensor) -> Tensor:
        x = self.norm(h, f"{at}.norm.weight")
        return self.swiglu(x, self.values[f"{at}.gate_up_proj.weight"], self.values[f"{at}.down_proj.weight"])

    def attention(self, at: str, h: Tensor) -> Tensor:
        shape = self.config.attention
        x = self.norm(h, f"{at}.norm.weight")
        query, key, value = (x @ self.values[f"{at}.{name}_proj.weight"].T for name in "qkv")
        length = h.shape[1]
        future = torch.ones(length, length).triu(1).bool()
        heads = []
        for head in range(shape.num_heads):
            group = head * shape.num_kv_heads // shape.num_heads
            q = self.rotated(query[..., head * shape.head_dim : (head + 1) * shape.head_dim])
            k = self.rotated(key[..., group * shape.head_dim : (group + 1) * shape.head_dim])
            v = value[..., group * shape.head_dim : (group + 1) * shape.head_dim]
            score = (q @ k.transpose(1, 2) / shape.head_dim**0.5).masked_fill(future, -torch.inf)
            heads.append(torch.softmax(score, -1) @ v)
        return torch.cat(heads, -1) @ self.values[f"{at}.o_proj.weight"].T

    def rotated(self, x_BSd: Tensor) -> Tensor:
        """Pairs (i, i + d/2) turned by position * theta^(-2i/d), as complex numbers; angles in float32 as the model has them."""
        half = x_BSd.shape[-1] // 2
        speed = self.config.rope.theta ** -(torch.arange(0, 2 * half, 2, dtype=torch.float32) / (2 * half))
        angle = torch.arange(x_BSd.shape[1], dtype=torch.float32).unsqueeze(1) * speed
        turn = torch.complex(angle.cos().double(), angle.sin().double())
        turned = torch.complex(x_BSd[..., :half], x_BSd[..., half:]) * turn
        return torch.cat([turned.real, turned.imag], -1)

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.config.norm_eps).sqrt() * self.values[name]

    def swiglu(self, x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        gate, up = (x @ gate_up.T).chunk(2, -1)
        return (silu(gate) * up) @ down.T
