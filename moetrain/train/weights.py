"""Weights of a bundle, or of a run's checkpoint, into a live engine, whatever its layout."""

from dataclasses import asdict
from pathlib import Path

import torch

from moetrain.base.errors import BundleError
from moetrain.checkpoint.recover import agreed_choice, restore
from moetrain.dist.mesh import Mesh
from moetrain.dist.world import World
from moetrain.model.config import ModelConfig
from moetrain.model.shapes import check_tensors
from moetrain.model.state import ModelState
from moetrain.optim.config import OptimConfig
from moetrain.parallel.config import EngineConfig, ParallelConfig
from moetrain.parallel.native import TorchEngine
from moetrain.store.bundle import Bundle
from moetrain.store.objects import place_of
from moetrain.text.tokenizer import Tokenizer

# What the loss asks for and how values begin: none of it changes what given weights compute.
TRAINING_ONLY = (
    "init_std", "routing.auxiliary_loss_weight", "routing.auxiliary_loss_scope", "routing.z_loss_weight", "routing.bias_update_rate",
    "routing.capacity_factor", "routing.drop_order",
)  # fmt: skip


def load_bundle(state: ModelState, config: ModelConfig, path: str | Path) -> None:
    """Fills the master fragments from the bundle; the optimizer's stay as they are. Raises BundleError when it is another model."""
    bundle = Bundle.open(path)
    require_same_model(bundle, config)
    check_tensors(config, bundle.shapes, str(path))
    name, tensor = "", torch.empty(0)
    with torch.no_grad():
        for fragment in state:
            if fragment.component != "master":
                continue
            if fragment.name != name:
                if fragment.name not in bundle.tensors:
                    raise BundleError(f"The bundle {path} has no tensor {fragment.name}.", "Export it again with this version.")
                name, tensor = fragment.name, bundle.tensors[fragment.name]
            whole = tensor if fragment.expert is None else tensor[fragment.expert]
            where = tuple(slice(o, o + s) for o, s in zip(fragment.box.offset, fragment.box.shape, strict=True))
            fragment.data.copy_(whole[where])


def require_same_model(bundle: Bundle, config: ModelConfig) -> None:
    """Raises BundleError listing the keys in which the bundle computes another function; a shorter context is the same function."""
    theirs, ours = (_computed(model) for model in (ModelConfig.from_dict(bundle.config), config))
    theirs["max_position"] = min(config.max_position, ModelConfig.from_dict(bundle.config).max_position)
    if changes := [f"model.{key}: {theirs[key]} -> {ours[key]}" for key in ours if theirs[key] != ours[key]]:
        hint = f"Make its model an option: moetrain config --from-bundle {bundle.folder} > conf/model/NAME.yaml, and use model=NAME."
        raise BundleError(f"The bundle {bundle.folder} is another model: {'; '.join(changes)}.", hint)


def require_same_tokenizer(bundle: Bundle, corpus: str) -> None:
    """`corpus` is the fingerprint that the corpus was prepared with. Raises BundleError when the bundle speaks another one."""
    own = fingerprint(bundle)
    if own is not None and own != corpus:
        given = "byte" if bundle.tokenizer is None else bundle.tokenizer
        hint = f"Prepare the text with it: moetrain data prepare ... --tokenizer {given}"
        raise BundleError(f"The bundle {bundle.folder} has another tokenizer than the corpus.", hint)


def fingerprint(bundle: Bundle) -> str | None:
    """Of the bundle's tokenizer; None when it has none."""
    if bundle.tokenizer is not None:
        return Tokenizer.load(bundle.tokenizer).fingerprint
    return Tokenizer.byte().fingerprint if bundle.tokenizer_facts.type == "byte" else None


def _computed(config: ModelConfig) -> dict[str, object]:
    """Dotted keys that decide what the model computes, with their values."""
    flat: dict[str, object] = {}
    for name, value in asdict(config).items():
        flat |= {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
    has_bias = config.routing.bias_update_rate > 0
    return {key: value for key, value in flat.items() if key not in TRAINING_ONLY} | {"routing.bias_update_rate > 0": has_bias}


def single_engine(folder: Path, config: ModelConfig, is_run: bool, settings: EngineConfig) -> TorchEngine:
    """One process with the weights of a run's newest good checkpoint, or of a bundle. Raises CheckpointError or BundleError."""
    world = World.single()
    engine = TorchEngine(config, ParallelConfig(ep=1), settings, OptimConfig(), world, Mesh(world, 1))
    state = [fragment for fragment in engine.state() if fragment.component == "master"]  # the optimizer's moments are not read
    if is_run:
        choice = agreed_choice(place_of(folder), "must")
        assert choice is not None
        restore(choice, state, world.size)
        engine.load(state)
    else:
        load_bundle(state, config, folder)
    return engine
