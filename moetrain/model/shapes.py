"""The names and shapes of a model's parameters, from its configuration alone (the table of docs/design.md). No torch."""

from collections.abc import Mapping

from moetrain.base.errors import BundleError
from moetrain.model.config import SHARED_GATES, ModelConfig
from moetrain.model.kinds import Kind, Place

Shape = tuple[int, ...]
EXPERT_LEAVES = ("moe.experts.gate_up_proj", "moe.experts.down_proj")


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Every parameter (and the balance bias) by name, whole: experts carry the leading axis E. In the order of the forward."""
    shapes: dict[str, Shape] = {"embedding.weight": (config.vocab_size, config.hidden_size)}
    for place in config.places():
        for name, shape in _block(config, place).items():
            shapes[f"blocks.{place.index}.{name}"] = shape
    shapes["final_norm.weight"] = (config.hidden_size,)
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    return shapes


def check_tensors(config: ModelConfig, shapes: Mapping[str, Shape], where: str) -> None:
    """Raises BundleError at the first tensor that is missing, unknown or of another shape. `where` names the file or folder."""
    expected = parameter_shapes(config)
    for name, shape in expected.items():
        if name not in shapes:
            raise BundleError(f"{where} lacks the tensor {name} of shape {list(shape)}.", "Write it again from its source.")
        if tuple(shapes[name]) != shape:
            sentence = f"{where} holds {name} with shape {list(shapes[name])}, its configuration asks for {list(shape)}."
            raise BundleError(sentence, "Its config.json and its weights belong to different models.")
    for name in shapes:
        if name not in expected:
            sentence = f"{where} holds the tensor {name}, which its configuration does not have."
            raise BundleError(sentence, "Its config.json and its weights belong to different models.")


def is_expert(name: str) -> bool:
    """Whether the parameter has the leading expert axis."""
    return name.endswith(EXPERT_LEAVES)


def _block(config: ModelConfig, place: Place) -> dict[str, Shape]:
    """One block's parameters, without the leading `blocks.{i}.`."""
    if place.bank is None:
        return _attention(config) | _mlp(config)
    dense = {f"dense.{name}": shape for name, shape in (_attention(config) | _mlp(config)).items()} if place.kind.is_pair else {}
    return dense | _attention(config) | (_moe(config, place.kind) if place.owns_bank else {})


def _attention(config: ModelConfig) -> dict[str, Shape]:
    shape, hidden = config.attention, config.hidden_size
    query, key = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    shapes: dict[str, Shape] = {"norm.weight": (hidden,)}
    for name, size in (("q_proj", (query, hidden)), ("k_proj", (key, hidden)), ("v_proj", (key, hidden)), ("o_proj", (hidden, query))):
        shapes[f"{name}.weight"] = size
        if shape.bias:
            shapes[f"{name}.bias"] = size[:1]
    if shape.qk_norm == "full":
        shapes |= {"q_norm.weight": (query,), "k_norm.weight": (key,)}
    if shape.qk_norm == "head":
        shapes |= {"q_norm.weight": (shape.head_dim,), "k_norm.weight": (shape.head_dim,)}
    return {f"attention.{name}": size for name, size in shapes.items()}


def _mlp(config: ModelConfig) -> dict[str, Shape]:
    return {"mlp.norm.weight": (config.hidden_size,)} | _swiglu("mlp", config.hidden_size, config.ffn_size)


def _moe(config: ModelConfig, kind: Kind) -> dict[str, Shape]:
    hidden, ffn, experts = config.hidden_size, config.expert_ffn_size, config.routing.num_experts
    shapes: dict[str, Shape] = {"moe.norm.weight": (hidden,), "moe.router.weight": (experts, hidden)}
    if config.routing.bias_update_rate > 0:
        shapes["moe.router.balance_bias"] = (experts,)
    shapes |= {"moe.experts.gate_up_proj": (experts, 2 * ffn, hidden), "moe.experts.down_proj": (experts, hidden, ffn)}
    if not kind.has_shared:
        return shapes
    shapes |= _swiglu("moe.shared", hidden, config.num_shared_experts * config.shared_ffn_size)
    if not kind.shares_norm:
        shapes["moe.shared.norm.weight"] = (hidden,)
    if SHARED_GATES[config.shared_gate]:
        shapes["moe.shared_gate.weight"] = (SHARED_GATES[config.shared_gate], hidden)
    return shapes


def _swiglu(prefix: str, hidden: int, ffn: int) -> dict[str, Shape]:
    return {f"{prefix}.gate_up_proj.weight": (2 * ffn, hidden), f"{prefix}.down_proj.weight": (hidden, ffn)}
