"""A prepared corpus on demand: made once, whole or not at all, and never mixed with one of other settings."""

from dataclasses import dataclass, fields
from pathlib import Path

from moetrain.base.errors import DataError
from moetrain.base.log import logger
from moetrain.data.config import DataConfig
from moetrain.data.files import SourceFile, fingerprint, list_files
from moetrain.data.folder import locked, written_whole
from moetrain.data.manifest import Manifest, Settings, is_prepared
from moetrain.data.progress import bars
from moetrain.data.split import check_fractions
from moetrain.data.writer import write_corpus
from moetrain.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Request:
    """What `moetrain data prepare` is asked for."""

    sources: list[str]
    out: Path
    tokenizer: str = "train"  # train | byte | path of a tokenizer.json
    vocab_size: int = 4096  # for tokenizer=train
    validation: float = 0.05  # fraction of documents
    test: float = 0.05


def prepare(request: Request, overwrite: bool = False, show_progress: bool = False) -> Manifest:
    """Writes the corpus folder `request.out`, or finds it already made from the same sources and settings.

    Waits while another process prepares the same folder. DataError: a source that cannot be read, nothing to train on, a folder that is
    in use for something else. ConfigError: fractions or vocabulary that are not possible.
    """
    check_fractions(request.validation, request.test)
    fixed = _given_tokenizer(request.tokenizer)
    files = list_files(request.sources, left_out=request.out)
    settings = _settings(request, fixed, files)
    with locked(request.out):
        if not overwrite and is_prepared(request.out):
            manifest = Manifest.read(request.out)
            _refuse_differences(request.out, manifest.settings, settings)
            logger("data").info("The corpus %s is already prepared.", request.out)
            return manifest
        if not is_prepared(request.out) and request.out.exists() and (not request.out.is_dir() or any(request.out.iterdir())):
            raise DataError(f"{request.out} exists and is no prepared corpus.", "Choose another --out folder, or remove it yourself.")
        with written_whole(request.out) as folder, bars(show_progress) as start_bar:
            manifest = write_corpus(folder, files, settings, fixed, start_bar)
            manifest.write(folder)
    return manifest


def ensure_prepared(config: DataConfig, show_progress: bool = False) -> None:
    """Prepares `config.corpora[0]` from `config.source` if it is missing; if it is there, it must fit the configuration.

    For one process (global rank 0); the others wait at a barrier and then open the corpora. DataError: see `prepare`.
    """
    if not config.source or not config.corpora:
        return
    request = Request(list(config.source), Path(config.corpora[0].path), config.tokenizer, config.vocab_size)
    if not is_prepared(request.out):
        logger("data").info("Preparing the corpus %s from %s.", request.out, ", ".join(request.sources))
        prepare(request, show_progress=show_progress)
        return
    made = Manifest.read(request.out).settings
    asked = _settings(request, _given_tokenizer(request.tokenizer), [])
    # The text is what the run started with, even if the sources changed since: only the settings have to agree.
    _refuse_differences(request.out, made, asked, ignore=("source_fingerprint", "validation", "test"))


def _given_tokenizer(name: str) -> Tokenizer | None:
    """The tokenizer that is not trained, or None."""
    if name == "train":
        return None
    return Tokenizer.byte() if name == "byte" else Tokenizer.load(name)


def _settings(request: Request, fixed: Tokenizer | None, files: list[SourceFile]) -> Settings:
    kind = request.tokenizer if fixed is None or request.tokenizer == "byte" else f"file {fixed.fingerprint}"
    return Settings(
        tokenizer=kind,
        vocab_size=request.vocab_size if fixed is None else fixed.vocab_size,
        validation=request.validation,
        test=request.test,
        sources=[Path(source).name or source for source in request.sources],
        source_fingerprint=fingerprint(files),
    )


def _refuse_differences(folder: Path, made: Settings, asked: Settings, ignore: tuple[str, ...] = ()) -> None:
    for field in fields(Settings):
        before, now = getattr(made, field.name), getattr(asked, field.name)
        if field.name in ignore or before == now:
            continue
        if field.name == "source_fingerprint":
            difference = "other source files than there are now"
        else:
            difference = f"{field.name}={before!r}, not {now!r}"
        hint = "Choose another folder, or replace it: moetrain data prepare ... --overwrite"
        raise DataError(f"The corpus {folder} was prepared with {difference}.", hint)
