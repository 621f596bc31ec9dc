"""AdamW and the learning-rate schedule, as configuration. No torch."""

from dataclasses import dataclass

from moetrain.base.errors import ConfigError, one_of

SCHEDULES = ("cosine", "wsd", "constant")


@dataclass
class OptimConfig:
    """AdamW (arXiv 1711.05101) with a step per expert; norms, biases and one-dimensional tensors are not decayed."""

    lr: float = 1e-3  # peak
    beta1: float = 0.9  # decay of the first moment
    beta2: float = 0.95  # decay of the second moment
    eps: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.1  # times the learning rate, per step; 0 = off
    grad_clip: float = 1.0  # global norm; 0 = off
    schedule: str = "cosine"  # cosine | wsd (warm-up, stable, decay) | constant
    warmup_fraction: float = 0.05  # of all steps
    decay_fraction: float = 0.2  # wsd: last part of all steps
    min_lr_ratio: float = 0.1  # final lr / peak

    def check(self, key: str = "optim") -> None:
        """Raises ConfigError at the first broken rule."""
        one_of(f"{key}.schedule", self.schedule, SCHEDULES)
        for name, value in (("lr", self.lr), ("eps", self.eps)):
            if not value > 0:
                raise ConfigError.of(f"{key}.{name}", value, "it must be positive")
        for name, value in (("weight_decay", self.weight_decay), ("grad_clip", self.grad_clip)):
            if not value >= 0:
                raise ConfigError.of(f"{key}.{name}", value, "it must not be negative", "Use 0 for off.")
        for name, value in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 <= value < 1:
                raise ConfigError.of(f"{key}.{name}", value, "it must be at least 0 and below 1")
        for name, value in (
            ("warmup_fraction", self.warmup_fraction),
            ("decay_fraction", self.decay_fraction),
            ("min_lr_ratio", self.min_lr_ratio),
        ):
            if not 0 <= value <= 1:
                raise ConfigError.of(f"{key}.{name}", value, "it must lie between 0 and 1")
        if self.schedule == "wsd" and self.warmup_fraction + self.decay_fraction > 1:
            rule = f"together with warmup_fraction={self.warmup_fraction:g} it is longer than the whole run"
            raise ConfigError.of(f"{key}.decay_fraction", self.decay_fraction, rule, "Let the two add up to at most 1.")
