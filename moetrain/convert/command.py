"""`moetrain export` and `moetrain import`. Heavy imports wait until a command runs."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moetrain.store.bundle import Contents

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

DTYPES = ("float32", "bfloat16", "float16")


def add_parsers(subparsers: "Subparsers") -> None:
    """Registers both commands; each sets `run`, a function from the parsed arguments to an exit code."""
    export = subparsers.add_parser(
        "export",
        help="write a run as a bundle or a Hugging Face folder",
        description="Writes the newest good checkpoint of a run (or a bundle) as a bundle, which `moetrain generate` reads, or as a "
        "Hugging Face folder, which transformers loads. Blocks and gates without a Hugging Face class are refused.",
    )
    export.add_argument("source", metavar="RUN", type=Path, help="run folder, such as runs/gpt_moe_8e, or a bundle")
    export.add_argument("--format", choices=("bundle", "huggingface"), default="bundle", help="what to write (default: bundle)")
    export.add_argument("--architecture", metavar="NAME", help="mixtral, qwen3_moe or olmoe (default: the one that fits the model)")
    _add_common(export, "the one of the training data or the bundle")
    export.set_defaults(run=run_export)
    folder = subparsers.add_parser(
        "import",
        help="turn a Hugging Face folder into a bundle",
        description="Turns a Mixtral, Qwen3-MoE or OLMoE folder into a bundle. A configuration key that moetrain does not compute is "
        "refused by name, so that what the bundle computes is what the folder computed.",
    )
    folder.add_argument("source", metavar="DIR", type=Path, help="folder with config.json and safetensors files")
    _add_common(folder, "the one of the folder")
    folder.set_defaults(run=run_import)


def _add_common(parser: argparse.ArgumentParser, tokenizer: str) -> None:
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder to write; it appears when it is complete")
    parser.add_argument("--tokenizer", metavar="FILE", help=f"a tokenizer.json, or byte (default: {tokenizer})")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as they are)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export at --out")


def run_export(args: argparse.Namespace) -> int:
    _log()
    from moetrain.convert.export import export

    contents = export(args.source, args.out, args.format, args.architecture, args.tokenizer, args.dtype, args.overwrite)
    print(summary(contents, args.out))
    return 0


def run_import(args: argparse.Namespace) -> int:
    _log()
    from moetrain.convert.export import import_folder

    print(summary(import_folder(args.source, args.out, args.tokenizer, args.dtype, args.overwrite), args.out))
    return 0


def summary(contents: "Contents", out: Path) -> str:
    """One sentence about what stands in `out` now."""
    from moetrain.convert.card import parameters
    from moetrain.model.config import ModelConfig
    from moetrain.model.count import count_parameters

    count = count_parameters(ModelConfig.from_dict(contents.config))
    step = f" of step {contents.training['step']}" if "step" in contents.training else ""
    size = sum(file.stat().st_size for file in out.iterdir() if file.suffix == ".safetensors")
    values = f"{parameters(count.total)} parameters ({parameters(count.active)} active)"
    return f"Wrote the model{step} to {out}: {values}, {size / 1e6:.1f} MB of weights."


def _log() -> None:
    from moetrain.base.log import configure

    configure()
