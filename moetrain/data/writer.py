"""Documents to the files of a corpus: tokenizer, tokens per split, held-out text. Nothing here knows about locks or folders in use."""

import gzip
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from io import TextIOWrapper
from itertools import chain
from pathlib import Path

from moetrain.base.errors import DataError
from moetrain.data.documents import Document, read_documents
from moetrain.data.files import SourceFile
from moetrain.data.manifest import Manifest, Settings, Split, TokenizerFacts, held_out_file, prefix
from moetrain.data.megatron import IndexedWriter
from moetrain.data.progress import Advance, StartBar
from moetrain.data.split import SPLITS, TRAIN, split_of
from moetrain.text.tokenizer import Tokenizer

_BATCH_CHARACTERS = 1 << 20  # tokenised at a time
_PIECE_CHARACTERS = 1 << 22  # a longer document is tokenised in pieces: an encoding takes a hundred bytes of memory per token
_PIECE_END = re.compile(r"(?<=\S)\n(?=[^\W\d_])")  # a single line break before a letter: byte-level BPE never merges across its end


def write_corpus(folder: Path, files: list[SourceFile], settings: Settings, fixed: Tokenizer | None, start_bar: StartBar) -> Manifest:
    """Fills the empty `folder` with everything but the manifest, which is returned. `fixed` is the tokenizer unless one is trained.

    DataError: a source that cannot be read, or no document left to train on.
    """
    total = sum(file.num_bytes for file in files)
    tokenizer = fixed or _train_tokenizer(files, settings, start_bar("learning tokens", total))
    tokenizer.save(folder)
    skipped: Counter[str] = Counter()
    writers = {split: _SplitWriter(folder, split, tokenizer) for split in SPLITS}
    for document, ids in tokenised(read_documents(files, skipped, start_bar("writing tokens", total)), tokenizer):
        writers[_split(document, settings)].add(document, ids)
    splits = {split: writer.finish() for split, writer in writers.items()}
    if not splits[TRAIN].documents:
        raise _nothing_to_train_on(settings)
    return Manifest(
        settings=settings,
        tokenizer=TokenizerFacts(tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.end_id),
        splits=splits,
        skipped=dict(sorted(skipped.items())),
    )


def tokenised(
    documents: Iterable[Document], tokenizer: Tokenizer, piece_characters: int = _PIECE_CHARACTERS
) -> Iterator[tuple[Document, list[int]]]:
    """Each document with its ids (no end token), tokenised in batches on all cores."""
    for batch in _batches(documents):
        pieces = [_pieces(document.text, piece_characters) for document in batch]
        ids = iter(tokenizer.encode_batch(list(chain.from_iterable(pieces))))
        for document, own in zip(batch, pieces, strict=True):
            yield document, [index for _ in own for index in next(ids)]


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _pieces(text: str, limit: int) -> list[str]:
    pieces = []
    start = 0
    while len(text) - start > limit and (cut := _PIECE_END.search(text, start + limit)):
        pieces.append(text[start : cut.end()])
        start = cut.end()
    return [*pieces, text[start:]]


def _train_tokenizer(files: list[SourceFile], settings: Settings, advance: Advance) -> Tokenizer:
    """Sees the training split only: held-out text must stay unseen."""
    documents = read_documents(files, Counter(), advance)
    texts = (document.text for document in documents if _split(document, settings) == TRAIN)
    first = next(texts, None)
    if first is None:
        raise _nothing_to_train_on(settings)
    return Tokenizer.train(chain([first], texts), settings.vocab_size)


def _split(document: Document, settings: Settings) -> str:
    return split_of(document.path, settings.validation, settings.test)


def _nothing_to_train_on(settings: Settings) -> DataError:
    sources = ", ".join(settings.sources)
    return DataError(f"No document of {sources} is left to train on.", "Give more documents, or hold out less: --validation, --test.")


class _SplitWriter:
    """The tokens of one split, and its text when it is held out."""

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer) -> None:
        self._prefix = prefix(folder, split)
        self._end_id = tokenizer.end_id
        self._tokens = IndexedWriter(self._prefix, tokenizer.vocab_size)
        self._text = None if split == TRAIN else _HeldOutText(held_out_file(folder, split))
        self._documents = self._num_tokens = self._num_bytes = 0

    def add(self, document: Document, ids: list[int]) -> None:
        self._tokens.add([*ids, self._end_id])
        self._documents += 1
        self._num_tokens += len(ids) + 1
        self._num_bytes += len(document.text.encode())
        if self._text is not None:
            self._text.add(document)

    def finish(self) -> Split:
        self._tokens.finish()
        if self._text is not None:
            self._text.finish()
        return Split(
            documents=self._documents,
            tokens=self._num_tokens,
            num_bytes=self._num_bytes,
            dtype=self._tokens.dtype.name,
            bin_sha256=_sha256(self._prefix.with_suffix(".bin")),
            idx_sha256=_sha256(self._prefix.with_suffix(".idx")),
        )


class _HeldOutText:
    """Gzipped JSONL; no file name and no time inside, so equal text gives equal bytes."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        self._file = path.open("wb")
        self._gzip = gzip.GzipFile(filename="", mode="wb", fileobj=self._file, mtime=0)
        self._lines = TextIOWrapper(self._gzip, encoding="utf-8", newline="")

    def add(self, document: Document) -> None:
        self._lines.write(json.dumps({"path": document.path, "text": document.text}) + "\n")

    def finish(self) -> None:
        self._lines.close()
        self._file.close()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
