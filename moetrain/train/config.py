"""One training run, as configuration: length, batch, evaluation, samples. No torch."""

from dataclasses import dataclass, field


@dataclass
class RunConfig:
    """The run folder is `folder`/`name`; the same command again resumes it."""

    name: str = "scratch"  # of the run and its folder; experiments set their own
    folder: str = "runs"  # where run folders lie
    seed: int = 1  # initial parameter values
    stop_after: int = 0  # stop (with a checkpoint) after this step without changing the schedule; 0 = off


@dataclass
class TrainingConfig:
    """Length and batch. The global batch in tokens is part of the run's identity; accumulation is derived from it."""

    tokens: int = 1_000_000  # rounded up to whole steps
    global_batch_tokens: int = 4096  # per optimizer step over all ranks; a multiple of data.seq_len
    micro_batch_size: int = 0  # sequences per rank and forward; 0 = auto (as many as fit the global batch, at most 8)
    accumulation: int = 0  # forwards per step; 0 = derived from the two above
    evaluate_every: int = 0  # steps; 0 = only at the end
    evaluate_batches: int = 0  # during training: batches of validation text; 0 = all
    sample_every: int = 0  # steps between printed samples; 0 = never
    sample_prompts: list[str] = field(default_factory=lambda: ["def "])  # texts that the samples go on from
    sample_tokens: int = 60  # tokens of each sample
