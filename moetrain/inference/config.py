"""What one request may ask for, as configuration. No torch."""

from dataclasses import dataclass

from moetrain.base.errors import ConfigError


@dataclass(frozen=True)
class SamplingParams:
    """How a completion is drawn and when it ends. Frozen: a request keeps the parameters it was submitted with."""

    max_tokens: int = 128  # tokens drawn at most
    temperature: float = 0.8  # divides the logits; 0 = greedy: the likeliest token, ties to the lowest id
    top_k: int = 0  # only the k likeliest tokens; 0 = all
    top_p: float = 0.95  # only the smallest set of likeliest tokens that holds this probability; 1 = all
    seed: int = 0  # of this request's own random generator
    stop: tuple[int, ...] = ()  # token ids that end the completion

    def check(self) -> None:
        """Raises ConfigError at the first broken rule."""
        if self.max_tokens < 1:
            raise ConfigError.of("max_tokens", self.max_tokens, "at least one token must be drawn")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError.of("temperature", self.temperature, "it must be a number from 0 up", "Use 0 for greedy decoding.")
        if self.top_k < 0:
            raise ConfigError.of("top_k", self.top_k, "it must not be negative", "Use 0 for all tokens.")
        if not 0 < self.top_p <= 1:
            raise ConfigError.of("top_p", self.top_p, "it must lie above 0 and at most at 1", "Use 1 for all tokens.")
        if not 0 <= self.seed < 2**63:
            raise ConfigError.of("seed", self.seed, "it must be a whole number from 0 to 2^63 - 1")
