"""Preparing a corpus: what is written, that it is written whole and once, and what is refused."""

import argparse
import gzip
import hashlib
import json
import shutil
import socket
import threading
from pathlib import Path

import numpy as np
import pytest

from moetrain.base.errors import ConfigError, DataError, MoetrainError
from moetrain.data import command
from moetrain.data import prepare as module
from moetrain.data.config import CorpusConfig, DataConfig
from moetrain.data.corpus import open_corpora
from moetrain.data.documents import Document
from moetrain.data.folder import locked, written_whole
from moetrain.data.manifest import Manifest, read_held_out
from moetrain.data.prepare import Request, ensure_prepared, prepare
from moetrain.data.split import SPLITS, split_of
from moetrain.data.writer import tokenised
from moetrain.text.tokenizer import Tokenizer

WORDS = ["def", "return", "import", "class", "self", "value", "number", "é", "🙂", "\n\n", "   ", "if", "for"]
TEXTS = {f"package/module_{number}.py": " ".join(WORDS[(number + i * i) % len(WORDS)] for i in range(60)) for number in range(60)}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, text in TEXTS.items():
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "tree"


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def stored(folder: Path, split: str) -> list[list[int]]:
    """The documents of a split as megatron-core reads them."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(folder / split))
    assert dataset.document_indices.tolist() == list(range(len(dataset) + 1))
    return [np.asarray(dataset.get(index)).tolist() for index in range(len(dataset))]


@pytest.mark.parametrize("tokenizer", ["train", "byte"])
def test_every_document_comes_back_from_its_split(tree: Path, tmp_path: Path, tokenizer: str) -> None:
    manifest = prepare(Request([str(tree)], tmp_path / "out", tokenizer, vocab_size=400, validation=0.1, test=0.1))
    decoder = Tokenizer.load(tmp_path / "out")
    assert manifest == Manifest.read(tmp_path / "out")
    for split in SPLITS:
        texts = [text for name, text in sorted(TEXTS.items()) if split_of(name, 0.1, 0.1) == split]
        documents = stored(tmp_path / "out", split)
        assert [decoder.decode(ids) for ids in documents] == texts
        assert all(ids[-1] == decoder.end_id and decoder.end_id not in ids[:-1] for ids in documents)
        facts = manifest.splits[split]
        assert (facts.documents, facts.num_bytes) == (len(texts), sum(len(text.encode()) for text in texts))
        assert (facts.tokens, facts.dtype) == (sum(map(len, documents)), "uint16")
        for suffix, recorded in ((".bin", facts.bin_sha256), (".idx", facts.idx_sha256)):
            assert hashlib.sha256((tmp_path / "out" / f"{split}{suffix}").read_bytes()).hexdigest() == recorded


def test_held_out_text_is_kept_in_the_order_of_the_tokens(tree: Path, tmp_path: Path) -> None:
    prepare(Request([str(tree)], tmp_path / "out", "byte", validation=0.1, test=0.2))
    for split in ("validation", "test"):
        names = [name for name in sorted(TEXTS) if split_of(name, 0.1, 0.2) == split]
        assert list(read_held_out(tmp_path / "out", split)) == [Document(name, TEXTS[name]) for name in names]
    with gzip.open(tmp_path / "out" / "held_out" / "validation.jsonl.gz") as lines:
        assert set(json.loads(lines.readline())) == {"path", "text"}
    with pytest.raises(DataError, match="no held-out text for 'train'"):
        list(read_held_out(tmp_path / "out", "train"))


def test_the_tokenizer_never_sees_held_out_text(tree: Path, tmp_path: Path) -> None:
    held_out = next(name for name in TEXTS if split_of(name, 0.1, 0.1) != "train")
    prepare(Request([str(tree)], tmp_path / "one", vocab_size=400, validation=0.1, test=0.1))
    (tree / held_out).write_text("zzzzzzzz " * 1000)
    prepare(Request([str(tree)], tmp_path / "two", vocab_size=400, validation=0.1, test=0.1))
    assert (tmp_path / "one" / "tokenizer.json").read_bytes() == (tmp_path / "two" / "tokenizer.json").read_bytes()
    assert (tmp_path / "one" / "train.bin").read_bytes() == (tmp_path / "two" / "train.bin").read_bytes()


def test_the_same_text_elsewhere_gives_the_same_bytes(tree: Path, tmp_path: Path) -> None:
    shutil.copytree(tree, tmp_path / "another" / "tree")
    prepare(Request([str(tree)], tmp_path / "one", vocab_size=400))
    prepare(Request([str(tmp_path / "another" / "tree")], tmp_path / "two", vocab_size=400))
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert str(tmp_path).encode() not in b"".join(files(tmp_path / "one").values())


def test_preparing_again_finds_it_and_touches_nothing(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request([str(tree)], tmp_path / "out", "byte")
    first = prepare(request)
    monkeypatch.setattr(module, "write_corpus", None)
    assert prepare(request) == first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 500}, "vocab_size=400, not 500"),
        ({"tokenizer": "byte"}, "tokenizer='train', not 'byte'"),
        ({"validation": 0.2}, r"validation=0\.1, not 0\.2"),
        ({"text": "more"}, "other source files than there are now"),
    ],
)
def test_other_settings_are_refused_unless_overwritten(tree: Path, tmp_path: Path, change: dict, message: str) -> None:
    settings: dict = {"tokenizer": "train", "vocab_size": 400, "validation": 0.1, "test": 0.1}
    prepare(Request([str(tree)], tmp_path / "out", **settings))
    before = files(tmp_path / "out")
    if "text" in change:
        (tree / "new.py").write_text(change["text"])
    else:
        settings |= change
    request = Request([str(tree)], tmp_path / "out", **settings)
    with pytest.raises(DataError, match=message) as refusal:
        prepare(request)
    assert "--overwrite" in refusal.value.hint
    assert files(tmp_path / "out") == before
    assert prepare(request, overwrite=True) == prepare(request)
    assert files(tmp_path / "out") != before


def test_a_folder_of_other_things_is_never_replaced(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(DataError, match="is no prepared corpus"):
            prepare(Request([str(tree)], tmp_path / "out", "byte"), overwrite)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "precious"


def test_an_interrupted_preparation_leaves_nothing_and_the_next_one_succeeds(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request([str(tree)], tmp_path / "out", "byte")

    def interrupted(folder: Path, *_: object) -> Manifest:
        (folder / "train.bin").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_corpus", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(request)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out.partial*"))
    killed, elsewhere = tmp_path / f".out.partial-7@{socket.gethostname()}", tmp_path / ".out.partial-7@another"
    killed.mkdir()
    elsewhere.mkdir()
    (killed / "train.bin").write_bytes(b"left by a killed process")
    prepare(request)
    assert (tmp_path / "out" / "manifest.json").is_file()
    assert not killed.exists()
    assert elsewhere.exists()  # another host, which may be writing


def test_of_two_hosts_that_write_one_corpus_the_first_to_rename_wins(tmp_path: Path) -> None:
    with written_whole(tmp_path / "out") as mine:
        (mine / "made").write_text("here")
        other = tmp_path / ".out.partial-7@another"
        other.mkdir()
        (other / "made").write_text("elsewhere")
        other.rename(tmp_path / "out")
    assert (tmp_path / "out" / "made").read_text() == "elsewhere"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_overwrite_keeps_the_old_corpus(tree: Path, tmp_path: Path) -> None:
    prepare(Request([str(tree)], tmp_path / "out", "byte"))
    before = files(tmp_path / "out")
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        prepare(Request([str(tmp_path / "bad.jsonl")], tmp_path / "out", "byte"), overwrite=True)
    assert files(tmp_path / "out") == before


def test_two_at_once_write_one_corpus(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks belong to open files, so threads stand in for processes."""
    written: list[Path] = []
    write = module.write_corpus

    def counted(folder: Path, *rest) -> Manifest:
        written.append(folder)
        return write(folder, *rest)

    monkeypatch.setattr(module, "write_corpus", counted)
    results: list[Manifest] = []
    threads = [threading.Thread(target=lambda: results.append(prepare(Request([str(tree)], tmp_path / "out", "byte")))) for _ in range(2)]
    with locked(tmp_path / "out"):
        for thread in threads:
            thread.start()
        assert not written
    for thread in threads:
        thread.join()
    assert len(written) == 1
    assert results[0] == results[1]


def test_a_given_tokenizer_is_used_and_recorded(tree: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(TEXTS.values(), 300)
    tokenizer.save(tmp_path / "mine.json")
    request = Request([str(tree)], tmp_path / "out", str(tmp_path / "mine.json"))
    manifest = prepare(request)
    assert (manifest.tokenizer.sha256, manifest.tokenizer.vocab_size) == (tokenizer.fingerprint, 300)
    Tokenizer.train(TEXTS.values(), 310).save(tmp_path / "mine.json")
    with pytest.raises(DataError, match="was prepared with tokenizer="):
        prepare(request)


def test_long_documents_tokenised_in_pieces_give_the_same_ids() -> None:
    tokenizer = Tokenizer.train(TEXTS.values(), 400)
    text = Path(argparse.__file__).read_text()
    ((_, whole),) = tokenised([Document("x", text)], tokenizer)
    ((_, pieced),) = tokenised([Document("x", text)], tokenizer, piece_characters=500)
    assert whole == pieced == tokenizer.encode(text)


def test_a_large_vocabulary_takes_four_bytes_per_token(tree: Path, tmp_path: Path) -> None:
    from tokenizers import AddedToken

    core = Tokenizer.byte().core
    core.add_tokens([AddedToken(f"¤{number}¤") for number in range(70_000)])
    core.save(str(tmp_path / "large.json"))
    (tmp_path / "one.txt").write_text("é¤69999¤")
    manifest = prepare(Request([str(tmp_path / "one.txt")], tmp_path / "out", str(tmp_path / "large.json"), validation=0.0, test=0.0))
    assert manifest.splits["train"].dtype == "int32"
    assert stored(tmp_path / "out", "train") == [[*"é".encode(), 257 + 69_999, 256]]
    assert np.fromfile(tmp_path / "out" / "train.bin", dtype=np.int32).tolist() == [195, 169, 70_256, 256]


@pytest.mark.parametrize("tokenizer", ["train", "byte"])
def test_nothing_left_to_train_on_is_refused(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "e.txt").write_text("")
    with pytest.raises(DataError, match=r"No document of e\.txt is left to train on"):
        prepare(Request([str(tmp_path / "e.txt")], tmp_path / "out", tokenizer))
    assert not (tmp_path / "out").exists()


def test_training_prepares_its_source_once_and_keeps_it_when_files_change(tree: Path, tmp_path: Path) -> None:
    config = DataConfig(corpora=[CorpusConfig(str(tmp_path / "out"))], source=[str(tree)], tokenizer="train", vocab_size=400)
    ensure_prepared(config)
    before = files(tmp_path / "out")
    (tree / "package" / "module_1.py").write_text("a newer Python")
    ensure_prepared(config)
    assert files(tmp_path / "out") == before
    (corpus,) = open_corpora(config)
    assert corpus.tokenizer().vocab_size == corpus.manifest.tokenizer.vocab_size
    config.vocab_size = 500
    with pytest.raises(DataError, match="vocab_size=400, not 500"):
        ensure_prepared(config)


def test_a_missing_corpus_without_source_names_the_command(tmp_path: Path) -> None:
    config = DataConfig(corpora=[CorpusConfig(str(tmp_path / "none"))])
    ensure_prepared(config)
    with pytest.raises(DataError, match="no prepared corpus") as refusal:
        open_corpora(config)
    assert "moetrain data prepare" in refusal.value.hint


def test_a_changed_tokenizer_file_is_noticed(tree: Path, tmp_path: Path) -> None:
    prepare(Request([str(tree)], tmp_path / "out", vocab_size=400))
    Tokenizer.byte().save(tmp_path / "out")
    (corpus,) = open_corpora(DataConfig(corpora=[CorpusConfig(str(tmp_path / "out"))]))
    with pytest.raises(DataError, match="is not the one its tokens were made with"):
        corpus.tokenizer()


def test_a_damaged_manifest_is_refused_and_can_be_overwritten(tree: Path, tmp_path: Path) -> None:
    request = Request([str(tree)], tmp_path / "out", "byte")
    prepare(request)
    (tmp_path / "out" / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="is damaged") as refusal:
        prepare(request)
    assert "--overwrite" in refusal.value.hint
    prepare(request, overwrite=True)
    assert Manifest.read(tmp_path / "out").splits["train"].documents > 0


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_parsers(parser.add_subparsers())
    args = parser.parse_args(["data", "prepare", *arguments])
    return args.run(args)


def test_the_command_prints_the_counts(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tree / "empty.py").write_text("")
    arguments = [str(tree), "--out", str(tmp_path / "out"), "--tokenizer", "byte", "--validation", "0.1", "--test", "0"]
    assert run(*arguments) == 0
    printed = capsys.readouterr()
    manifest = Manifest.read(tmp_path / "out")
    assert f"{manifest.splits['train'].tokens:,}" in printed.out
    assert "left out: 1 empty" in printed.out
    assert "No document fell into test" in printed.err
    with pytest.raises(MoetrainError, match="validation"):
        run(*arguments[:-4], "--validation", "0.2", "--test", "0")
    assert run(*arguments[:-4], "--validation", "0.2", "--test", "0", "--overwrite") == 0


def test_a_vocabulary_too_small_for_bytes_is_refused(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vocab_size=100"):
        run(str(tree), "--out", str(tmp_path / "out"), "--vocab-size", "100")
