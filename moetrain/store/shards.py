"""Named tensors in sharded safetensors files: read lazily through a memory map, written one shard at a time. No torch at import."""

import json
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from safetensors import SafetensorError, safe_open

from moetrain.base.errors import BundleError
from moetrain.base.log import logger

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SHARD_BYTES = 4_000_000_000


class TensorInfo(NamedTuple):
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: str  # float32 | bfloat16 | float16

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


Table = Mapping[str, TensorInfo]


class Shards(Mapping[str, "Tensor"]):
    """The tensors of a folder by name. Opening reads the headers only and checks them against the index and the file sizes.

    `table` gives shapes and dtypes without torch; a lookup returns a CPU tensor whose pages are read when touched and which must
    not be written to.
    Raises BundleError for a file that is missing, cut off or of another format.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.table: dict[str, TensorInfo] = {}
        self._file_of = _read_index(folder)
        for file in sorted(set(self._file_of.values())):
            self.table |= self._read_header(file)
        # Order of the index, which is the order the tensors were written in.
        self.table = {name: self.table[name] for name in self._file_of}
        self._opened: dict[str, safe_open] = {}

    def __getitem__(self, name: str) -> "Tensor":
        file = self._file_of[name]
        if file not in self._opened:
            self._opened[file] = safe_open(self.folder / file, framework="pt")
        return self._opened[file].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.table)

    def __len__(self) -> int:
        return len(self.table)

    @property
    def num_bytes(self) -> int:
        return sum(info.num_bytes for info in self.table.values())

    def _read_header(self, file: str) -> dict[str, TensorInfo]:
        path = self.folder / file
        if not path.is_file():
            raise BundleError(f"{path} is missing.", "Copy the whole folder again from its source.")
        try:
            with safe_open(path, framework="np") as opened:
                slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a Mapping)
                found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
        except (SafetensorError, OSError) as error:
            raise BundleError(f"{path} is damaged: {error}.", "Copy the whole folder again from its source.") from error
        for name in (name for name, place in self._file_of.items() if place == file and name not in found):
            raise BundleError(f"{path} lacks the tensor {name} that its index names.", "Copy the whole folder again from its source.")
        for name, (_, dtype) in found.items():
            if name not in self._file_of:
                raise BundleError(f"{path} holds the tensor {name} that its index does not name.", "Copy the folder again from its source.")
            if dtype not in DTYPES:
                rule = f"only {', '.join(DTYPES.values())} are read"
                raise BundleError(f"{path} holds {name} as {dtype}; {rule}.", "Convert the weights first; quantised weights are not read.")
        return {name: TensorInfo(shape, DTYPES[dtype]) for name, (shape, dtype) in found.items()}


def write_shards(folder: Path, table: Table, load: Callable[[str], "Tensor"], single: bool = False, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes the tensors of `table`, each asked of `load` once, shard by shard: no more than one shard is in memory.

    single: weights that fit one shard are written as model.safetensors without an index, as Hugging Face folders have it.
    """
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors.torch import save_file

    split = split_state_dict_into_shards_factory(
        dict(table),
        get_storage_size=lambda info: info.num_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    first = SINGLE if single else "model-00001-of-00001.safetensors"
    files = split.filename_to_tensors if split.is_sharded else {first: list(table)}
    for file, names in files.items():
        tensors = {name: load(name).contiguous() for name in names}
        for name, tensor in tensors.items():
            found = TensorInfo(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            if found != table[name]:
                raise ValueError(f"{name} was announced as {table[name]} and came as {found}")
        save_file(tensors, folder / file, metadata={"format": "pt"})
        logger("store").info("Wrote %s, %.1f MB in %d tensors.", file, sum(table[name].num_bytes for name in names) / 1e6, len(names))
    if split.is_sharded or not single:
        place = {name: file for file, names in files.items() for name in names}
        size = {"total_size": sum(info.num_bytes for info in table.values())}
        index = {"metadata": size, "weight_map": {name: place[name] for name in table}}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def _read_index(folder: Path) -> dict[str, str]:
    """File of every tensor."""
    index = folder / INDEX
    if not index.is_file():
        if not (folder / SINGLE).is_file():
            raise BundleError(f"{folder} holds neither {INDEX} nor {SINGLE}.", "Weights are read from safetensors files only.")
        try:
            with safe_open(folder / SINGLE, framework="np") as opened:
                return {name: SINGLE for name in opened.keys()}  # noqa: SIM118 (not a Mapping)
        except (SafetensorError, OSError) as error:
            raise BundleError(f"{folder / SINGLE} is damaged: {error}.", "Copy the whole folder again from its source.") from error
    try:
        places = json.loads(index.read_text())["weight_map"]
        if not all(isinstance(file, str) and Path(file).name == file for file in places.values()):
            raise ValueError("a file name is not a plain name")
        return dict(places)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{index} is damaged: {error!r}.", "Copy the whole folder again from its source.") from error
