"""From logits to a token: pure functions of logits, parameters and one uniform number. V vocabulary.

The law is computed in float64 on the host, so that it depends on the logits alone and not on who shares the batch.
"""

import torch
from torch import Tensor

from moetrain.inference.config import SamplingParams


def choose(logits_V: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """The next token. Greedy uses no random number; otherwise exactly one is taken from `generator` (a CPU generator)."""
    if params.temperature == 0:
        return greedy(logits_V)
    uniform = float(torch.rand((), dtype=torch.float64, generator=generator))
    return draw(law(logits_V, params), uniform)


def greedy(logits_V: Tensor) -> int:
    """The likeliest token; of equal ones the lowest id."""
    return int(logits_V.argmax())


def law(logits_V: Tensor, params: SamplingParams) -> Tensor:
    """float64 probabilities [V] that `draw` follows: temperature, then top-k, then top-p over what top-k left (temperature > 0)."""
    logits_V = logits_V.detach().to("cpu", torch.float64)
    # The likeliest token is moved to 0 first: a tiny temperature must not overflow.
    probability_V = torch.softmax((logits_V - logits_V.max()) / params.temperature, dim=-1)
    if params.top_k:
        probability_V = keep_top_k(probability_V, params.top_k)
    if params.top_p < 1:
        probability_V = keep_top_p(probability_V, params.top_p)
    return probability_V


def keep_top_k(probability_V: Tensor, top_k: int) -> Tensor:
    """The k likeliest tokens (ties to the lowest id), renormalised."""
    kept = torch.sort(probability_V, descending=True, stable=True).indices[:top_k]
    return _only(probability_V, kept)


def keep_top_p(probability_V: Tensor, top_p: float) -> Tensor:
    """The smallest set of likeliest tokens with probability >= top_p (nucleus sampling, arXiv 1904.09751), renormalised; never empty."""
    ordered = torch.sort(probability_V, descending=True, stable=True)
    before = ordered.values.cumsum(0) - ordered.values  # what likelier tokens already hold
    size = max(1, int((before < top_p).sum()))
    return _only(probability_V, ordered.indices[:size])


def draw(probability_V: Tensor, uniform: float) -> int:
    """The token whose stretch of the cumulative law holds `uniform` (0 <= uniform < 1); never one of probability 0."""
    cumulative_V = probability_V.cumsum(0)
    target = uniform * cumulative_V[-1]  # the last sum may miss 1 by rounding
    token = int(torch.searchsorted(cumulative_V, target, right=True))
    return min(token, int(probability_V.nonzero()[-1]))


def _only(probability_V: Tensor, kept: Tensor) -> Tensor:
    left_V = torch.zeros_like(probability_V)
    left_V[kept] = probability_V[kept]
    return left_V / left_V.sum()
