"""How well general compressors and a unigram model do on the held-out bytes a model is evaluated on.

    python tools/compare_compression.py prepared/stdlib [--split validation] [--json FILE]

gzip -9 is given its better chance of two: every file alone, or all files concatenated. The unigram model codes the corpus's own
tokens by their training frequencies (add-one), end-of-document tokens included, as the model's figure includes them.
"""

import argparse
import gzip
import json
import lzma
import math
from collections import Counter
from pathlib import Path

import numpy as np

from moetrain.data.manifest import read_held_out
from moetrain.text.tokenizer import Tokenizer


def bits_per_byte(prepared: Path, split: str) -> dict[str, float]:
    """Bits per held-out byte of each coder, and the number of bytes."""
    texts = [document.text.encode() for document in read_held_out(prepared, split)]
    num_bytes = sum(map(len, texts))
    whole = b"".join(texts)
    return {
        "bytes": num_bytes,
        "documents": len(texts),
        "gzip_per_file": 8 * sum(len(gzip.compress(text, 9)) for text in texts) / num_bytes,
        "gzip_concatenated": 8 * len(gzip.compress(whole, 9)) / num_bytes,
        "xz_concatenated": 8 * len(lzma.compress(whole, preset=9 | lzma.PRESET_EXTREME)) / num_bytes,
        "unigram": unigram_bits(prepared, texts) / num_bytes,
    }


def unigram_bits(prepared: Path, texts: list[bytes]) -> float:
    """Code length of the held-out tokens under training frequencies."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    tokenizer = Tokenizer.load(prepared)
    train = IndexedDataset(str(prepared / "train"))
    counts = np.ones(tokenizer.vocab_size)
    for index in range(len(train)):
        np.add.at(counts, np.asarray(train[index], dtype=np.int64), 1)
    bits = -np.log2(counts / counts.sum())
    held_out = Counter[int]()
    for text in texts:
        held_out.update(tokenizer.encode(text.decode()))
        held_out[tokenizer.end_id] += 1
    return math.fsum(bits[token] * count for token, count in held_out.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prepared", type=Path)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = bits_per_byte(options.prepared, options.split)
    result["gzip"] = min(result["gzip_per_file"], result["gzip_concatenated"])
    for name, value in result.items():
        print(f"{name:20} {value:,.4f}" if isinstance(value, float) else f"{name:20} {value:,}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
