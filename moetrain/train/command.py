"""`moetrain evaluate`: bits per byte of a run's newest checkpoint, or of a bundle, on prepared held-out text."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from moetrain.base.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from moetrain.data.batch import Batch
    from moetrain.model.config import ModelConfig
    from moetrain.train.evaluate import EvaluationResult

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parsers(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser(
        "evaluate",
        help="bits per byte of a run or bundle on held-out text",
        description="Predicts every held-out token once and prints nats per token and bits per byte. One process, any checkpoint.",
    )
    parser.add_argument("model", metavar="RUN|BUNDLE", type=Path, help="run folder (its newest good checkpoint) or bundle")
    parser.add_argument("--data", metavar="DIR", type=Path, help="prepared corpus (default: the run's first)")
    parser.add_argument("--split", default="validation", help="validation or test (default: %(default)s)")
    parser.add_argument("--seq-len", type=int, default=0, help="window in tokens (default: the run's, or the bundle's longest)")
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
    from moetrain.model.config import ModelConfig
    from moetrain.store.bundle import Bundle

    if not (folder / "config.yaml").is_file():
        model = ModelConfig.from_dict(Bundle.open(folder).config)
        return Source(model, False, None, model.max_position, False)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    data: Mapping[str, object] = config["data"]
    corpora = config["data"]["corpora"]
    path = Path(corpora[0]["path"]) if corpora else None
    return Source(ModelConfig.from_dict(config["model"]), True, path, int(config["data"]["seq_len"]), bool(data["document_boundaries"]))


def evaluate_folder(folder: Path, source: Source, data: Path, split: str, seq_len: int) -> "EvaluationResult":
    """In this process. Raises BundleError, CheckpointError or DataError with the way out."""
    from moetrain.data.manifest import Manifest
    from moetrain.data.windows import evaluation_windows
    from moetrain.train.evaluate import evaluate
    from moetrain.train.weights import single_engine

    manifest = Manifest.read(data)
    if manifest.tokenizer.vocab_size > source.model.vocab_size:
        sentence = f"The corpus {data} has {manifest.tokenizer.vocab_size} tokens, the model {source.model.vocab_size}."
        raise BundleError(sentence, "Prepare the text with the model's tokenizer: moetrain data prepare ... --tokenizer FILE.")
    engine = single_engine(folder, source.model, source.is_run)
    windows = evaluation_windows(data, split, seq_len, max(seq_len // 2, 1), 8, document_boundaries=source.document_boundaries)
    return evaluate(engine, _shown(windows), manifest.splits[split])


def _shown(batches: "Iterable[Batch]") -> "Iterator[Batch]":
    """With a progress line on a terminal."""
    from rich.progress import track

    yield from track(batches, description="evaluating", transient=True)
