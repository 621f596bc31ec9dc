"""A run folder as bundle contents: its configuration, its newest good checkpoint, its tokenizer, and what is known of its training."""

import subprocess
from dataclasses import asdict
from pathlib import Path

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from yaml import YAMLError

import moetrain
from moetrain.base.errors import BundleError
from moetrain.base.log import logger
from moetrain.checkpoint.choose import Choice
from moetrain.checkpoint.recover import agreed_choice, restore
from moetrain.model.config import ModelConfig
from moetrain.model.shapes import Shape, is_expert, parameter_shapes
from moetrain.model.state import Box, Fragment, ModelState
from moetrain.store.bundle import Contents, TokenizerFacts
from moetrain.store.objects import place_of
from moetrain.store.shards import TensorInfo
from moetrain.telemetry.experts import load_snapshots, relative_load
from moetrain.telemetry.record import METRICS_FILE, read_records
from moetrain.text.tokenizer import Tokenizer

Values = dict[str, object]


def read_run(folder: Path, tokenizer: str | None = None) -> Contents:
    """The model of the newest good checkpoint; float32, each tensor read when asked for.

    tokenizer: a tokenizer.json or `byte`, in place of the one beside the training data.
    Raises BundleError for a folder that is no run, CheckpointError when it has no good checkpoint.
    """
    settings = _read_settings(folder)
    config = ModelConfig.from_dict(group(settings, "model", folder))
    choice = agreed_choice(place_of(folder), str(folder))
    assert choice is not None
    for damage in choice.damage:
        logger("convert").warning(damage)
    weights = RunWeights(choice, config)
    facts = find_tokenizer(tokenizer or _corpus(settings, folder))
    return Contents(asdict(config), _facts(folder, settings, choice), facts, weights.table, weights.load)


class RunWeights:
    """Whole float32 tensors out of a checkpoint. Keeps the last one: an export asks for its parts one after another."""

    def __init__(self, choice: Choice, config: ModelConfig) -> None:
        self.choice = choice
        self.table = {name: TensorInfo(shape, "float32") for name, shape in parameter_shapes(config).items()}
        self._last: tuple[str, Tensor] | None = None

    def load(self, name: str) -> Tensor:
        """Raises CheckpointError when the checkpoint lacks the tensor or holds another shape."""
        if self._last is None or self._last[0] != name:
            whole = torch.empty(self.table[name].shape)
            restore(self.choice, fragments(name, whole), self.choice.manifest.world)
            self._last = name, whole
        return self._last[1]


def fragments(name: str, whole: Tensor) -> ModelState:
    """The master values of one parameter as views into `whole`: one fragment, or one for each expert."""

    def fragment(bank: str | None, expert: int | None, shape: Shape, data: Tensor) -> Fragment:
        return Fragment(name, "master", bank, expert, shape, Box.whole(shape), (0,), data)

    if not is_expert(name):
        return [fragment(None, None, tuple(whole.shape), whole)]
    bank = name.rpartition(".")[0]
    return [fragment(bank, expert, tuple(data.shape), data) for expert, data in enumerate(whole)]


def find_tokenizer(source: str) -> TokenizerFacts:
    """The tokenizer `byte`, of a tokenizer.json, or of the folder it lies in. Raises DataError if it cannot be read."""
    tokenizer = Tokenizer.byte() if source == "byte" else Tokenizer.load(source)
    if tokenizer.is_byte:
        return TokenizerFacts("byte", [tokenizer.end_id], tokenizer.end_id)
    file = Path(source) / "tokenizer.json" if Path(source).is_dir() else Path(source)
    # pad stays unset: torch's Embedding would give the padding row no gradient, and ours is the end-of-text token.
    return TokenizerFacts("file", [tokenizer.end_id], tokenizer.end_id, None, {"tokenizer.json": file})


def group(settings: Values, name: str, folder: Path) -> Values:
    values = settings.get(name)
    if not isinstance(values, dict):
        raise BundleError(f"{folder / 'config.yaml'} has no group {name}.", "Give the folder of a run: runs/<name>.")
    return values


def _read_settings(folder: Path) -> Values:
    """The resolved TrainConfig of a run as plain data."""
    file = folder / "config.yaml"
    if not file.is_file():
        raise BundleError(f"{folder} is neither a run (it has no config.yaml) nor a bundle.", "Give the folder of a run: runs/<name>.")
    try:
        values = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    except (YAMLError, OmegaConfBaseException, OSError) as error:
        raise BundleError(f"{file} is damaged: {error}.", "Copy the run folder again.") from error
    if not isinstance(values, dict):
        raise BundleError(f"{file} holds no configuration.", "Copy the run folder again.")
    return {str(key): value for key, value in values.items()}


def _corpus(settings: Values, folder: Path) -> str:
    """The prepared corpus whose tokenizer the run used: from here, or from where the run was started (above runs/<name>)."""
    corpora = group(settings, "data", folder).get("corpora")
    if not isinstance(corpora, list) or not corpora:
        raise BundleError(f"{folder / 'config.yaml'} names no corpus, so the tokenizer is not known.", "Give it: --tokenizer FILE.")
    path = Path(str(corpora[0]["path"]))
    for place in (path, folder.absolute().parent.parent / path):
        if (place / "tokenizer.json").is_file():
            return str(place)
    raise BundleError(f"The run's corpus {path} is not here, so the tokenizer is missing.", "Give it: --tokenizer FILE (or byte).")


def _facts(folder: Path, settings: Values, choice: Choice) -> Values:
    """What the model card tells: only what the run folder says."""
    run, data = group(settings, "run", folder), group(settings, "data", folder)
    facts: Values = {
        "run": run.get("name"),
        "step": choice.manifest.step,
        "tokens": choice.manifest.progress.get("tokens"),
        "seed": run.get("seed"),
        "data": {key: data.get(key) for key in ("name", "seq_len", "document_boundaries")},
        "moetrain": moetrain.__version__,
    }
    if (evaluation := _last_evaluation(folder, choice.manifest.step)) is not None:
        facts["evaluation"] = evaluation
    if (commit := code_commit()) is not None:
        facts["commit"] = commit
    return facts | {"experts": _experts(folder, choice)}


def _last_evaluation(folder: Path, step: int) -> Values | None:
    """The last evaluation up to the exported step."""
    records = read_records(folder) if (folder / METRICS_FILE).is_file() else []
    for record in reversed(records):
        at = record.get("train/step")
        if "evaluation/loss" in record and isinstance(at, int) and at <= step:
            facts: Values = {key.partition("/")[2]: value for key, value in record.items() if key.startswith("evaluation/")}
            return {"step": at} | facts
    return None


def _experts(folder: Path, choice: Choice) -> list[Values]:
    """One row per bank: how even its load was last, and how old its oldest expert is in a partial checkpoint."""
    oldest: dict[str, int] = {}
    for (bank, _), age in choice.manifest.ages().items():
        oldest[bank] = max(age, oldest.get(bank, 0))
    rows: dict[str, Values] = {bank: {"bank": bank, "oldest_steps": age} for bank, age in oldest.items()}
    snapshots = [snapshot for snapshot in load_snapshots(folder) if snapshot.step <= choice.manifest.step]
    if snapshots:
        relative_LE = relative_load(snapshots[-1].load_LE)
        for bank, load_E in zip(snapshots[-1].banks, relative_LE, strict=True):
            if bank in rows:
                rows[bank] |= {"load_max_over_mean": round(float(load_E.max()), 3), "dead_experts": int((load_E == 0).sum())}
    return list(rows.values())


def code_commit() -> str | None:
    """The git commit of this moetrain, if it runs from a checkout (an installed copy inside another repository has none)."""
    package = Path(moetrain.__file__)
    git = ["git", "-C", str(package.parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", package.name], check=True, capture_output=True)
        return subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
