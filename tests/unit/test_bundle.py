"""The bundle: whole or not at all, read lazily, every damage named in one sentence."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from moetrain.base.errors import BundleError, ConfigError
from moetrain.model.config import ModelConfig
from moetrain.model.gpt import GPT
from moetrain.model.shapes import check_tensors, parameter_shapes
from moetrain.store.bundle import Bundle, Contents, TokenizerFacts, write_bundle
from moetrain.store.folder import new_folder
from moetrain.store.shards import TensorInfo
from moetrain.text.tokenizer import Tokenizer
from tests.unit.inference_kit import CONFIGS, SMALL, filled


def contents(config: ModelConfig = SMALL, facts: TokenizerFacts | None = None) -> Contents:
    state = {name: tensor.float() for name, tensor in filled(config).state_dict().items()}
    table = {name: TensorInfo(tuple(tensor.shape), "float32") for name, tensor in state.items()}
    return Contents(asdict(config), {"step": 7, "data": {"name": "x"}}, facts or TokenizerFacts("byte", [256]), table, state.__getitem__)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_bundle(tmp_path / "bundle", contents(), "card", shard_bytes=10_000)
    return tmp_path / "bundle"


@pytest.mark.parametrize("name", CONFIGS)
def test_names_and_shapes_follow_from_the_configuration(name: str) -> None:
    model = GPT(CONFIGS[name])
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == parameter_shapes(CONFIGS[name])


@pytest.mark.parametrize("name", ["scmoe 2", "all blocks", "clip and bias", "sigmoid with bias balancing", "untied"])
def test_what_was_written_is_read(name: str, tmp_path: Path) -> None:
    written = contents(CONFIGS[name])
    write_bundle(tmp_path / "bundle", written, "# A card\n")
    bundle = Bundle.open(tmp_path / "bundle")
    assert ModelConfig.from_dict(bundle.config) == CONFIGS[name]
    assert bundle.training == written.training
    assert list(bundle.tensors) == list(written.table)
    assert all(torch.equal(bundle.tensors[key], written.load(key)) for key in written.table)
    check_tensors(CONFIGS[name], bundle.shapes, "here")
    assert (tmp_path / "bundle/README.md").read_text() == "# A card\n"


def test_shards_stay_below_their_size_and_hold_every_tensor_once(folder: Path) -> None:
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    assert files == [f"model-{n + 1:05d}-of-{len(files):05d}.safetensors" for n in range(len(files))]
    assert len(files) > 2
    places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert sorted(places) == sorted(parameter_shapes(SMALL))
    bundle = Bundle.open(folder)
    for file in files:
        held = [bundle.tensors.table[name].num_bytes for name, place in places.items() if place == file]
        assert sum(held) <= 10_000 or len(held) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_keeps_its_type(dtype: str, tmp_path: Path) -> None:
    source = contents()
    kind = {"bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    source.table = {name: info._replace(dtype=dtype) for name, info in source.table.items()}
    load, source.load = source.load, lambda name: load(name).to(kind)
    write_bundle(tmp_path / "bundle", source, "card")
    tensors = Bundle.open(tmp_path / "bundle").tensors
    assert torch.equal(tensors["embedding.weight"], load("embedding.weight").to(kind))
    assert tensors.num_bytes == sum(tensor.numel() * 2 for tensor in tensors.values())


def test_a_tokenizer_travels_with_its_files(tmp_path: Path) -> None:
    Tokenizer.train(["a b c " * 9], 260).save_huggingface(tmp_path)
    write_bundle(tmp_path / "bundle", contents(facts=TokenizerFacts.of_folder(tmp_path, [256], 1, None)), "card")
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.tokenizer == tmp_path / "bundle/tokenizer.json"
    assert Tokenizer.load(tmp_path / "bundle").encode("a b") == Tokenizer.load(tmp_path).encode("a b")
    assert (bundle.tokenizer_facts.eos, bundle.tokenizer_facts.bos, bundle.tokenizer_facts.pad) == ([256], 1, None)
    (tmp_path / "bundle/tokenizer.json").unlink()
    with pytest.raises(BundleError, match=r"tokenizer\.json is missing"):
        Bundle.open(tmp_path / "bundle")


def test_a_byte_tokenizer_needs_no_file(folder: Path) -> None:
    bundle = Bundle.open(folder)
    assert (bundle.tokenizer, bundle.tokenizer_facts.type) == (None, "byte")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


FIRST, INDEX = "model-00001-of", "model.safetensors.index.json"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda b: os.rename(b, b.with_name("away")), r"config\.json does not exist"),
    "no config": (lambda b: (b / "config.json").unlink(), r"config\.json does not exist"),
    "config cut": (lambda b: cut(b / "config.json"), r"config\.json is damaged"),
    "config a list": (lambda b: (b / "config.json").write_text("[]"), "no JSON object"),
    "foreign": (lambda b: change(b / "config.json", format="other"), "is not a moetrain bundle"),
    "newer": (lambda b: change(b / "config.json", version=2), "version 2, this moetrain reads version 1"),
    "no model": (lambda b: change(b / "config.json", model=None), "lacks the group model"),
    "odd tokenizer": (lambda b: change(b / "config.json", tokenizer={"type": "odd"}), "tokenizer type 'odd'"),
    "odd end": (lambda b: change(b / "config.json", tokenizer={"type": "byte", "eos": ["x"]}), "neither a token id"),
    "no index": (lambda b: (b / INDEX).unlink(), "holds neither"),
    "index cut": (lambda b: cut(b / INDEX), r"index\.json is damaged"),
    "index leads out": (lambda b: change(b / INDEX, weight_map={"x": "../x"}), "not a plain name"),
    "index names more": (lambda b: change(b / INDEX, weight_map={**places(b), "more": first(b).name}), "lacks the tensor more"),
    "index names less": (lambda b: change(b / INDEX, weight_map=dict(list(places(b).items())[1:])), r"its index does not name|index\.json"),
    "no shard": (lambda b: first(b).unlink(), "is missing"),
    "shard cut": (lambda b: cut(first(b)), "is damaged"),
    "shard empty": (lambda b: first(b).write_bytes(b""), "is damaged"),
    "shard header": (lambda b: first(b).write_bytes(b"\xff" * 99), "is damaged"),
}


def places(bundle: Path) -> dict[str, str]:
    return json.loads((bundle / INDEX).read_text())["weight_map"]


def first(bundle: Path) -> Path:
    return next(bundle.glob(f"{FIRST}*"))


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_one_sentence_with_a_way_out(damage: str, folder: Path) -> None:
    harm, sentence = DAMAGES[damage]
    harm(folder)
    with pytest.raises(BundleError, match=sentence) as error:
        Bundle.open(folder)
    assert error.value.hint


def test_weights_of_another_model_are_named(folder: Path) -> None:
    shapes = Bundle.open(folder).shapes
    with pytest.raises(BundleError, match=r"lacks the tensor blocks\.2\.attention\.norm\.weight"):
        check_tensors(ModelConfig.from_dict(asdict(SMALL) | {"num_layers": 3}), shapes, str(folder))
    with pytest.raises(BundleError, match=r"holds the tensor blocks\.1\.attention"):
        check_tensors(ModelConfig.from_dict(asdict(SMALL) | {"num_layers": 1}), shapes, str(folder))
    with pytest.raises(BundleError, match=r"embedding\.weight with shape \[61, 24\].*\[62, 24\]"):
        check_tensors(ModelConfig.from_dict(asdict(SMALL) | {"vocab_size": 62}), shapes, str(folder))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"hiden_size": 3}, "Did you mean hidden_size"),
        ({"hidden_size": "24"}, "its type must be int"),
        ({"num_layers": True}, "its type must be int"),
        ({"attention": {"sliding_window": 1.5}}, r"model\.attention\.sliding_window"),
        ({"routing": 3}, "must be a group"),
        ({"pattern": "moe"}, "list of words"),
        ({"routing": {"top_k": 99}}, "top_k"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(values: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        ModelConfig.from_dict(values)


def test_a_taken_target_is_refused_and_untouched(folder: Path) -> None:
    with pytest.raises(BundleError, match="exists") as error:
        write_bundle(folder, contents(), "new")
    assert "--overwrite" in error.value.hint
    assert (folder / "README.md").read_text() == "card"
    write_bundle(folder, contents(), "new", overwrite=True)
    assert (folder / "README.md").read_text() == "new"
    assert sorted(path.name for path in folder.parent.iterdir()) == ["bundle"]
    assert len(list(folder.glob("*.safetensors"))) == 1


def test_only_an_earlier_export_is_ever_replaced(tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/mine.txt").write_text("dear")
    with pytest.raises(BundleError, match="no export"):
        write_bundle(tmp_path / "letters", contents(), "card", overwrite=True)
    with pytest.raises(BundleError, match="is a file"):
        write_bundle(tmp_path / "letters/mine.txt", contents(), "card", overwrite=True)
    assert (tmp_path / "letters/mine.txt").read_text() == "dear"


def test_an_empty_folder_is_a_fine_target(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    write_bundle(tmp_path / "bundle", contents(), "card")
    assert Bundle.open(tmp_path / "bundle").shapes == parameter_shapes(SMALL)


def test_a_failure_half_way_leaves_nothing_behind(tmp_path: Path, folder: Path) -> None:
    broken = contents()
    load = broken.load

    def fail(name: str) -> torch.Tensor:
        if name == "final_norm.weight":
            raise OSError("disk full")
        return load(name)

    broken.load = fail
    with pytest.raises(BundleError, match="disk full"):
        write_bundle(folder, broken, "new", overwrite=True, shard_bytes=10_000)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert torch.equal(Bundle.open(folder).tensors["final_norm.weight"], load("final_norm.weight"))


def test_a_bundle_can_replace_itself(folder: Path) -> None:
    expected = {name: tensor.clone() for name, tensor in Bundle.open(folder).tensors.items()}
    write_bundle(folder, Bundle.open(folder).contents, "again", overwrite=True)
    found = Bundle.open(folder).tensors
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_tensor_that_is_not_the_announced_one_is_a_bug_that_shows(tmp_path: Path) -> None:
    wrong = contents()
    wrong.load = lambda name: torch.zeros(3)
    with pytest.raises(ValueError, match=r"embedding\.weight was announced"):
        write_bundle(tmp_path / "bundle", wrong, "card")


def test_a_target_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="cannot be written"), new_folder(tmp_path / "file/bundle"):
        pass


def test_shapes_are_read_without_torch(folder: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from moetrain.store.bundle import Bundle\n"
        "from moetrain.model.config import ModelConfig\n"
        "from moetrain.model.shapes import check_tensors\n"
        "bundle = Bundle.open(sys.argv[1])\n"
        "check_tensors(ModelConfig.from_dict(bundle.config), bundle.shapes, 'here')\n"
        "print(len(bundle.tensors))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert int(done.stdout) == len(parameter_shapes(SMALL))
