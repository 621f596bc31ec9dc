"""The decoder-only GPT. B sequences, S tokens, D hidden, V vocabulary.

It knows no rank: which experts are here and how rows reach the others is handed in.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moetrain.model.attention import AttentionInputs
from moetrain.model.blocks import DenseBlock, RoutedBlock
from moetrain.model.config import ModelConfig
from moetrain.model.context import ForwardContext
from moetrain.model.dispatch import Dispatcher, LocalDispatcher
from moetrain.model.moe import MoE
from moetrain.model.norm import RMSNorm
from moetrain.routing.balance import merged
from moetrain.routing.types import RoutingStats


class GPTOutput(NamedTuple):
    logits_BSV: Tensor
    stats: list[RoutingStats]  # one per expert bank, in the order of ModelConfig.banks()


class BankSite(NamedTuple):
    """Where one expert bank's weights are: the experts of this rank in slot order, and the way to the others."""

    experts: tuple[int, ...]
    dispatcher: Dispatcher


class GPT(nn.Module):
    """Parameters are named and shaped as docs/design.md says; values come from `model.init` or a bundle, not from construction."""

    def __init__(self, config: ModelConfig, site: Callable[[str], BankSite] | None = None, experts_method: str = "auto") -> None:
        """site: bank name -> BankSite; None: every expert is here (one process)."""
        super().__init__()
        self.config = config
        everything = BankSite(tuple(range(config.routing.num_experts)), LocalDispatcher())
        # nn.Embedding draws its values, which on the meta device imports torch._dynamo: two seconds of every rank's start, for nothing.
        self.embedding = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size), freeze=False)
        self.blocks = nn.ModuleList()
        self.places, moe = config.places(), dict[str, MoE]()
        for place in self.places:
            if place.bank is None:
                self.blocks.append(DenseBlock(config, place.layer, f"blocks.{place.index}"))
                continue
            if place.owns_bank:
                here = everything if site is None else site(place.bank)
                moe[place.bank] = MoE(config, place.bank, here.experts, here.dispatcher, place.kind, experts_method)
            self.blocks.append(RoutedBlock(config, place, moe[place.bank]))
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, tokens_BS: Tensor, context: ForwardContext | None = None) -> GPTOutput:
        context = context or ForwardContext()
        inputs = AttentionInputs.of(self.config, context, (tokens_BS.shape[0], tokens_BS.shape[1]), tokens_BS.device)
        h_BSD = self.embedding(tokens_BS)
        stats: dict[str, list[RoutingStats]] = {}
        for place, block in zip(self.places, self.blocks, strict=True):
            h_BSD, of_block = block(h_BSD, inputs, context)
            if place.bank is not None:
                stats.setdefault(place.bank, []).extend(of_block)
        logits_BSV = context.timer("head", self.head, h_BSD)
        return GPTOutput(logits_BSV, [merged(of_bank) for of_bank in stats.values()])

    def head(self, h_BSD: Tensor) -> Tensor:
        """Logits [B, S, vocab_size] of the stream behind the last block."""
        weight = self.embedding.weight if self.config.tie_embeddings else self.lm_head.weight
        return nn.functional.linear(self.final_norm(h_BSD), weight)


def meta_model(config: ModelConfig, site: Callable[[str], BankSite] | None = None, experts_method: str = "auto") -> GPT:
    """The model without memory: shapes only, to be sharded and then filled."""
    with torch.device("meta"):
        return GPT(config, site, experts_method)
