"""The learning rate as a pure function of the step."""

from math import ceil, cos, pi

from moetrain.optim.config import OptimConfig


def lr_at(step: int, total_steps: int, config: OptimConfig) -> float:
    """Learning rate of update number `step` (0 is the first) of `total_steps`.

    Linear warm-up to `lr` over the first steps, then cosine (arXiv 1608.03983), wsd (arXiv 2404.06395 section 4: constant, then linear
    decay) or constant. Cosine and wsd end at lr * min_lr_ratio with the last step and stay there.
    """
    warmup = ceil(config.warmup_fraction * total_steps)
    done = step + 1
    if done < warmup:
        return config.lr * done / warmup
    if config.schedule == "constant":
        return config.lr
    decay = total_steps - warmup if config.schedule == "cosine" else ceil(config.decay_fraction * total_steps)
    left = min(1.0, max(0.0, (total_steps - done) / max(decay, 1)))
    share = (1 - cos(pi * left)) / 2 if config.schedule == "cosine" else left
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * share)
