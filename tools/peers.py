"""Other people's MoE language models of one shape, on one process, for tools/bench_peers.py. All start from our weights and train alike.

transformers' Mixtral and OLMoE as they are; the MoE layers of DeepSpeed and Megatron-Core inside our model, in place of ours (their models
around them need their launchers). Peers get torch's fused AdamW.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple, Protocol
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from moetrain.convert.families import choose, write_config
from moetrain.convert.names import ENDS, LEAVES
from moetrain.data.batch import Batch
from moetrain.dist.mesh import Mesh
from moetrain.dist.world import World
from moetrain.model.attention import AttentionInputs
from moetrain.model.blocks import BlockOutput, RoutedBlock
from moetrain.model.config import ModelConfig
from moetrain.model.context import ForwardContext
from moetrain.model.gpt import GPT
from moetrain.model.mlp import SwiGLU
from moetrain.optim.config import OptimConfig
from moetrain.parallel.config import EngineConfig, ParallelConfig
from moetrain.parallel.native import TorchEngine
from moetrain.routing.types import RoutingStats

LR = 1e-3


class Trained(NamedTuple):
    """Of one step: cross-entropy in nats a token, without balance losses, and the gradient norm before clipping."""

    loss: float
    grad_norm: float


class Trainer(Protocol):
    def step(self, batch: Batch) -> Trained: ...


class Ours:
    """moetrain's engine as a run uses it."""

    def __init__(self, config: ModelConfig, engine: EngineConfig) -> None:
        world = World.single(torch.device("cpu"))
        self.engine = TorchEngine(config, ParallelConfig(ep=1), engine, OptimConfig(), world, Mesh(world, 1))
        self.engine.initialize(0)

    def step(self, batch: Batch) -> Trained:
        result = self.engine.step([batch], LR, lambda: None)
        return Trained(result.loss, result.grad_norm)


class Peer:
    """A model trained by a plain loop: forward, backward, clip, fused AdamW."""

    def __init__(self, model: nn.Module, forward: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        """`forward`: tokens_BS -> logits_BSV and the weighted balance loss."""
        optim = OptimConfig()
        self.model, self._forward, self._clip = model, forward, optim.grad_clip
        decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
        rest = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, LR, (optim.beta1, optim.beta2), optim.eps, fused=True)

    def step(self, batch: Batch) -> Trained:
        logits_BSV, auxiliary = self._forward(batch.tokens_BS)
        loss = cross_entropy(logits_BSV.float().flatten(0, 1), batch.labels_BS.flatten())
        (loss + auxiliary).backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return Trained(float(loss.detach()), float(norm))


# transformers


def hugging_face(config: ModelConfig, experts: str) -> Peer:
    """transformers' class for this shape. `experts`: how it multiplies them: eager | grouped_mm | batched_mm."""
    transformers = import_module("transformers")
    family = choose(config)
    values = write_config(config, family, "float32")
    values |= {"output_router_logits": True, "use_cache": False}
    shape = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    model = transformers.AutoModelForCausalLM.from_config(shape, attn_implementation="sdpa", experts_implementation=experts)
    stored = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in filled(config).named_parameters():
            stored[theirs(name)].copy_(parameter)

    balance = vars(import_module(f"transformers.models.{family.name}.modeling_{family.name}"))["load_balancing_loss_func"]

    def forward(tokens_BS: Tensor) -> tuple[Tensor, Tensor]:
        output = model(input_ids=tokens_BS)
        return output.logits, shape.router_aux_loss_coef * balance(output.router_logits, config.routing.num_experts, config.routing.top_k)

    return Peer(model.train(), forward)


def theirs(name: str) -> str:
    """The name of one of our parameters in a live transformers model."""
    if name in ENDS:
        return ENDS[name]
    _, layer, leaf = name.split(".", 2)
    return f"model.layers.{layer}." + LEAVES.get(leaf, leaf.replace("attention.", "self_attn.").replace("moe.experts", "mlp.experts"))


def filled(config: ModelConfig) -> GPT:
    """Our model with the weights that every contender starts from."""
    return Ours(config, EngineConfig(autocast="off")).engine.model


# layers of others inside our model


class Guest(nn.Module):
    """A block: our attention and norm, another's MoE layer. `layer` maps x_BSD to its update and its balance loss per token."""

    def __init__(self, ours: RoutedBlock, layer: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.attention, self.norm, self.layer = ours.attention, ours.moe.norm, layer

    def forward(self, h_BSD: Tensor, inputs: AttentionInputs, context: ForwardContext) -> BlockOutput:
        h_BSD = h_BSD + self.attention(h_BSD, inputs)
        update_BSD, balance = self.layer(self.norm(h_BSD))
        nothing = torch.zeros(())
        return h_BSD + update_BSD, [RoutingStats(balance, nothing, nothing, nothing)]


def with_guests(config: ModelConfig, make: Callable[[RoutedBlock], nn.Module]) -> Peer:
    """Our model, every MoE layer replaced by `make` of it."""
    model = filled(config)
    for index, block in enumerate(model.blocks):
        if isinstance(block, RoutedBlock):
            model.blocks[index] = Guest(block, make(block))

    def forward(tokens_BS: Tensor) -> tuple[Tensor, Tensor]:
        output = model(tokens_BS)
        balance = torch.stack([stats.auxiliary for stats in output.stats]).sum()
        return output.logits_BSV, config.routing.auxiliary_loss_weight * balance

    return Peer(model, forward)


class DeepSpeedLayer(nn.Module):
    """deepspeed.moe.layer.MoE with all experts here, dropless as ours."""

    def __init__(self, ours: RoutedBlock, config: ModelConfig) -> None:
        super().__init__()
        self.moe = import_module("deepspeed.moe.layer").MoE(
            config.hidden_size, SwiGLU(config.hidden_size, config.expert_ffn_size), config.routing.num_experts, k=config.routing.top_k,
            drop_tokens=False, use_rts=False, top2_2nd_expert_sampling=False,
        )  # fmt: skip
        with torch.no_grad():
            self.moe.deepspeed_moe.gate.wg.weight.copy_(ours.moe.router.weight)
            for slot, expert in enumerate(self.moe.deepspeed_moe.experts.deepspeed_experts):
                expert.gate_up_proj.weight.copy_(ours.moe.experts.gate_up_proj[slot])
                expert.down_proj.weight.copy_(ours.moe.experts.down_proj[slot])

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        update_BSD, balance, _ = self.moe(x_BSD)
        return update_BSD, balance


@contextlib.contextmanager
def one_rank(folder: Path) -> Iterator[None]:
    """A process group of this process alone, which both libraries ask for."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{folder / 'store'}")
    try:
        yield
    finally:
        dist.destroy_process_group()


class MegatronLayer(nn.Module):
    """megatron.core's MoELayer with SequentialMLP experts (its grouped ones need a GPU's kernels)."""

    def __init__(self, ours: RoutedBlock, config: ModelConfig) -> None:
        super().__init__()
        core = "megatron.core."
        moe = import_module(core + "transformer.moe.moe_layer")
        experts = import_module(core + "transformer.moe.experts")
        mlp = import_module(core + "transformer.mlp")
        layers = import_module(core + "tensor_parallel.layers")
        spec = import_module(core + "transformer.spec_utils").ModuleSpec
        shape = import_module(core + "transformer.transformer_config").TransformerConfig(
            num_layers=1, hidden_size=config.hidden_size, num_attention_heads=config.attention.num_heads,
            ffn_hidden_size=config.expert_ffn_size, moe_ffn_hidden_size=config.expert_ffn_size,
            num_moe_experts=config.routing.num_experts, moe_router_topk=config.routing.top_k, moe_router_pre_softmax=False,
            moe_token_dispatcher_type="alltoall", moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.0,
            gated_linear_unit=True, activation_func=torch.nn.functional.silu, add_bias_linear=False, use_cpu_initialization=True,
            bias_activation_fusion=False, perform_initialization=True, moe_permute_fusion=False,
        )  # fmt: skip
        inner = mlp.MLPSubmodules(linear_fc1=layers.ColumnParallelLinear, linear_fc2=layers.RowParallelLinear)
        self.layer = moe.MoELayer(shape, moe.MoESubmodules(experts=spec(experts.SequentialMLP, submodules=inner)), layer_number=1)
        with torch.no_grad():
            self.layer.router.weight.copy_(ours.moe.router.weight)
            for slot, expert in enumerate(self.layer.experts.local_experts):
                expert.linear_fc1.weight.copy_(ours.moe.experts.gate_up_proj[slot])
                expert.linear_fc2.weight.copy_(ours.moe.experts.down_proj[slot])

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        update, _ = self.layer(x_BSD)
        return update, x_BSD.new_zeros(())


@contextlib.contextmanager
def megatron_on_cpu() -> Iterator[None]:
    """Megatron-Core asks CUDA for a device, streams and random states; here it gets the CPU's, and one rank of everything."""
    stream = mock.MagicMock()
    cuda = {
        "current_device": lambda: torch.device("cpu"), "current_stream": lambda *given: stream, "Stream": mock.MagicMock,
        "stream": lambda given: contextlib.nullcontext(), "get_rng_state": lambda *given: torch.get_rng_state(),
        "manual_seed": lambda seed: None, "is_available": lambda: False,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, value in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        state = import_module("megatron.core.parallel_state")
        utils = import_module("megatron.core.transformer.moe.moe_utils")
        stack.enter_context(mock.patch.object(utils, "te_general_gemm", None, create=True))
        state.initialize_model_parallel()
        stack.callback(state.destroy_model_parallel)
        yield
