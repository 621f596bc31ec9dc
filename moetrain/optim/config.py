"""AdamW and the learning-rate schedule, as configuration. No torch."""

from dataclasses import dataclass


@dataclass
class OptimConfig:
    """AdamW (arXiv 1711.05101) with a step per expert; norms, biases and one-dimensional tensors are not decayed."""

    lr: float = 1e-3  # peak
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    grad_clip: float = 1.0  # global norm; 0 = off
    schedule: str = "cosine"  # cosine | wsd (warm-up, stable, decay) | constant
    warmup_fraction: float = 0.05  # of all steps
    decay_fraction: float = 0.2  # wsd: last part of all steps
    min_lr_ratio: float = 0.1  # final lr / peak
