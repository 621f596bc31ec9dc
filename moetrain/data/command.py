"""`moetrain data prepare`: its arguments and what it prints."""

import argparse
import sys
from pathlib import Path

from moetrain.data.files import STDLIB


def add_parsers(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `data` with its subcommand `prepare`; `args.run` is set to `run`."""
    data = subparsers.add_parser("data", help="prepare text for training", description="Prepare text for training.")
    commands = data.add_subparsers(required=True, metavar="COMMAND")
    parser = commands.add_parser(
        "prepare",
        help="tokenise files into Megatron .bin/.idx with held-out documents",
        description="Tokenise SOURCE... into a corpus folder: Megatron .bin/.idx for train, validation and test, the tokenizer, the "
        "held-out text, and manifest.json. Documents are held out by a hash of their path.",
    )
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="a text file, a folder, a .jsonl or .parquet file with a text field (any of them also .gz or .zst), or the word "
        f"{STDLIB}: the standard library of this Python",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the corpus folder to write")
    parser.add_argument("--tokenizer", default="train", metavar="train|byte|FILE", help="train a BPE (default), bytes, or a tokenizer.json")
    parser.add_argument("--vocab-size", type=int, default=4096, metavar="N", help="tokens of a trained BPE (default %(default)s)")
    parser.add_argument("--validation", type=float, default=0.05, metavar="F", help="fraction of documents held out (default %(default)s)")
    parser.add_argument("--test", type=float, default=0.05, metavar="F", help="fraction held out for the end (default %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace a corpus that was prepared with other settings")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prepares and prints the counts. Errors are MoetrainError."""
    from moetrain.data.prepare import Request, prepare

    request = Request(args.sources, args.out, args.tokenizer, args.vocab_size, args.validation, args.test)
    manifest = prepare(request, overwrite=args.overwrite, show_progress=True)
    print(f"{args.out}: a vocabulary of {manifest.tokenizer.vocab_size} tokens")
    print(f"{'split':10} {'documents':>10} {'bytes':>14} {'tokens':>13} {'bytes/token':>11}")
    for name, split in manifest.splits.items():
        ratio = split.num_bytes / split.tokens if split.tokens else 0.0
        print(f"{name:10} {split.documents:10,} {split.num_bytes:14,} {split.tokens:13,} {ratio:11.3f}")
        if not split.documents:
            print(f"No document fell into {name}: give more documents or a larger fraction.", file=sys.stderr)
    if manifest.skipped:
        print("left out: " + ", ".join(f"{count} {reason}" for reason, count in manifest.skipped.items()))
    return 0
