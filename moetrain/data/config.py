"""Which text a run reads, as configuration. No torch."""

from dataclasses import dataclass, field


@dataclass
class CorpusConfig:
    """One prepared corpus and its share of the training blend."""

    path: str = ""  # folder written by `moetrain data prepare`
    weight: float = 1.0  # relative share of training samples


@dataclass
class DataConfig:
    """Training reads `corpora`; validation and test read their held-out documents."""

    name: str = "stdlib"  # label in logs and plots
    corpora: list[CorpusConfig] = field(default_factory=list)  # all prepared with the same tokenizer
    source: list[str] = field(default_factory=list)  # prepared into corpora[0].path if that is missing; "stdlib" = this Python's library
    tokenizer: str = "train"  # for `source`: train | byte | path of a tokenizer.json
    vocab_size: int = 4096  # for `source` with tokenizer=train
    seq_len: int = 256  # tokens per training sample
    document_boundaries: bool = False  # attention and positions restart at every document
    seed: int = 1234  # order of samples; a part of the run's identity
