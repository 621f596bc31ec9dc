"""Weights of a bundle, or of a run's checkpoint, into a live engine, whatever its layout."""

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


def load_bundle(state: ModelState, config: ModelConfig, path: str | Path) -> None:
    """Fills the master fragments from the bundle; the optimizer's stay as they are. Raises BundleError when the shapes differ."""
    bundle = Bundle.open(path)
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


def single_engine(folder: Path, config: ModelConfig, is_run: bool) -> TorchEngine:
    """One process with the weights of a run's newest good checkpoint, or of a bundle. Raises CheckpointError or BundleError."""
    world = World.single()
    engine = TorchEngine(config, ParallelConfig(ep=1), EngineConfig(), OptimConfig(), world, Mesh(world, 1))
    state = engine.state()
    if is_run:
        choice = agreed_choice(folder / "checkpoint", "must")
        assert choice is not None
        restore(choice, state, world.size)
        engine.load(state)
    else:
        load_bundle(state, config, folder)
    return engine
