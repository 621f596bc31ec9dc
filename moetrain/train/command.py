"""`moetrain evaluate`: bits per byte of a run's newest checkpoint, or of a bundle, on prepared held-out text."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from moetrain.base.errors import BundleError, ConfigError
from moetrain.parallel.config import EngineConfig

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from moetrain.data.batch import Batch
    from moetrain.model.config import ModelConfig
    from moetrain.train.evaluate import EvaluationResult

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

LONGEST_WINDOW = 2048  # of a bundle that does not say how it was trained; its model may have positions for far more
TOKENS_PER_BATCH = 4096


def add_parsers(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser(
        "evaluate",
        help="bits per byte of a run or bundle on held-out text",
        description="Predicts every held-out token once and prints nats per token and bits per byte. One process, any checkpoint.",
    )
    parser.add_argument("model", metavar="RUN|BUNDLE", type=Path, help="run folder (its newest good checkpoint) or bundle")
    parser.add_argument("--data", metavar="DIR", type=Path, help="prepared corpus (default: the run's first)")
    parser.add_argument("--split", choices=("validation", "test"), default="validation", help="held-out documents (default: %(default)s)")
    parser.add_argument("--seq-len", type=int, default=0, metavar="N", help="window in tokens (default: that of the training)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the result as JSON too")
    parser.set_defaults(run=run_evaluate)


@dataclass
class Source:
    """What the evaluated folder says of itself."""

    model: "ModelConfig"
    is_run: bool
    data: Path | None
    seq_len: int
    document_boundaries: bool
    tokenizer: str | None  # fingerprint; None: not known
    engine: EngineConfig


def run_evaluate(args: argparse.Namespace) -> int:
    source = read_source(args.model)
    data = args.data or source.data
    if data is None:
        raise BundleError(f"The bundle {args.model} names no held-out text.", "Give a prepared corpus: --data DIR.")
    result = evaluate_folder(args.model, source, data, args.split, args.seq_len or source.seq_len)
    facts = {"split": args.split, "tokens": result.num_tokens, "bytes": round(result.num_bytes), "nats_per_token": result.loss}
    facts["bits_per_byte"] = result.bits_per_byte
    print(f"{args.split}: {result.bits_per_byte:.4f} bits per byte, {result.loss:.4f} nats per token, {round(result.num_bytes):,} bytes")
    if args.json:
        args.json.write_text(json.dumps(facts, indent=2) + "\n")
    return 0


def read_source(folder: Path) -> Source:
    """Raises BundleError when the folder is neither a run nor a bundle."""
    return _read_run(folder) if (folder / "config.yaml").is_file() else _read_bundle(folder)


def _read_run(folder: Path) -> Source:
    from moetrain.model.config import ModelConfig

    config = yaml.safe_load((folder / "config.yaml").read_text())
    data, corpora = config["data"], config["data"]["corpora"]
    hashes = folder / "data.json"
    tokenizer = json.loads(hashes.read_text())["tokenizer"] if hashes.is_file() else None
    engine = EngineConfig(dtype=config["engine"]["dtype"], autocast=config["engine"]["autocast"])
    path = Path(corpora[0]["path"]) if corpora else None
    return Source(
        ModelConfig.from_dict(config["model"]), True, path, int(data["seq_len"]), bool(data["document_boundaries"]), tokenizer, engine
    )


def _read_bundle(folder: Path) -> Source:
    from moetrain.model.config import ModelConfig
    from moetrain.store.bundle import Bundle
    from moetrain.train.weights import fingerprint

    bundle = Bundle.open(folder)
    model = ModelConfig.from_dict(bundle.config)
    data = bundle.training.get("data")
    facts: Mapping[str, object] = data if isinstance(data, dict) else {}
    seq_len = facts.get("seq_len")
    window = seq_len if isinstance(seq_len, int) else min(model.max_position, LONGEST_WINDOW)
    return Source(model, False, None, window, facts.get("document_boundaries") is True, fingerprint(bundle), EngineConfig())


def evaluate_folder(folder: Path, source: Source, data: Path, split: str, seq_len: int) -> "EvaluationResult":
    """In this process. Raises BundleError, CheckpointError or DataError with the way out."""
    from moetrain.data.manifest import Manifest
    from moetrain.data.windows import evaluation_windows
    from moetrain.train.evaluate import evaluate
    from moetrain.train.weights import single_engine

    if not 1 <= seq_len <= source.model.max_position:
        raise ConfigError.of("--seq-len", seq_len, f"the model has positions for 1 to {source.model.max_position} tokens")
    manifest = Manifest.read(data)
    hint = "Prepare the text with the model's tokenizer: moetrain data prepare ... --tokenizer FILE."
    if source.tokenizer not in (None, manifest.tokenizer.sha256):
        raise BundleError(f"The corpus {data} was prepared with another tokenizer than that of {folder}.", hint)
    if manifest.tokenizer.vocab_size > source.model.vocab_size:
        raise BundleError(f"The corpus {data} has {manifest.tokenizer.vocab_size} tokens, the model {source.model.vocab_size}.", hint)
    engine = single_engine(folder, source.model, source.is_run, source.engine)
    rows, stride = max(TOKENS_PER_BATCH // seq_len, 1), max(seq_len // 2, 1)
    windows = evaluation_windows(data, split, seq_len, stride, rows, document_boundaries=source.document_boundaries)
    return evaluate(engine, _shown(windows), manifest.splits[split])


def _shown(batches: "Iterable[Batch]") -> "Iterator[Batch]":
    """With a progress line on a terminal."""
    from rich.progress import track

    yield from track(batches, description="evaluating", transient=True)
