"""Plain modules with the parameters of TransformerEngine's, for Megatron-Core's TransformerEngine spec on a CPU.

What each holds and how it is cut is TransformerEngine's own: LayerNormLinear keeps the norm's weight as layer_norm_weight beside weight,
GroupedLinear keeps weight0, weight1 … of its experts, a "duplicated" Linear is whole on every rank.
"""

from functools import partial

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, TEGroupedMLP
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint


def normed(x, weight, bias, config, eps: float):
    """`config`'s norm of `x` over its last dimension."""
    weight = weight + 1 if config.layernorm_zero_centered_gamma else weight
    if config.normalization == "RMSNorm":
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


class Norm(torch.nn.Module):
    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__()
        self.config, self.eps = config, eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size))
        if config.normalization == "LayerNorm":
            self.bias = torch.nn.Parameter(torch.zeros(hidden_size))

    def forward(self, x):
        return normed(x, self.weight, getattr(self, "bias", None), self.config, self.eps)


class Column(ColumnParallelLinear):
    def __init__(self, *args, stride: int = 1, name: str | None = None, **options):
        super().__init__(*args, **options)


class Row(RowParallelLinear):
    def __init__(self, *args, name: str | None = None, **options):
        super().__init__(*args, **options)


class NormColumn(Column):
    """Norm, then a linear cut by its rows."""

    def __init__(self, input_size: int, output_size: int, *, config, **options):
        super().__init__(input_size, output_size, config=config, **options)
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size))
        if config.normalization == "LayerNorm":
            self.layer_norm_bias = torch.nn.Parameter(torch.zeros(input_size))

    def forward(self, x):
        bias = getattr(self, "layer_norm_bias", None)
        return super().forward(normed(x, self.layer_norm_weight, bias, self.config, self.config.layernorm_epsilon))


class Whole(torch.nn.Module):
    """A linear that every rank holds whole."""

    def __init__(self, input_size: int, output_size: int, *, bias: bool = False, **_):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(output_size, input_size))
        self.bias = torch.nn.Parameter(torch.empty(output_size)) if bias else None

    def forward(self, x):
        return F.linear(x, self.weight, self.bias), None


class Grouped(torch.nn.Module):
    """One linear per expert of this rank."""

    def __init__(self, num_gemms: int, input_size: int, output_size: int, *, bias: bool = False, skip_bias_add: bool, cut: int, **_):
        super().__init__()
        ranks = parallel_state.get_expert_tensor_parallel_world_size()
        sizes = [output_size, input_size]
        sizes[cut] //= ranks
        self.experts, self.gives_bias, self.cut = range(num_gemms), skip_bias_add, cut
        for i in range(num_gemms):
            self.register_parameter(f"weight{i}", torch.nn.Parameter(torch.empty(sizes)))
            if bias:
                self.register_parameter(f"bias{i}", torch.nn.Parameter(torch.empty(sizes[0])))

    def forward(self, x, splits):
        pieces = torch.split(x, [int(n) for n in splits])
        biases = [getattr(self, f"bias{i}", None) for i in self.experts]
        added = [None] * len(biases) if self.gives_bias else biases
        out = torch.cat([F.linear(pieces[i], getattr(self, f"weight{i}"), added[i]) for i in self.experts])
        return out, biases if self.gives_bias and biases[0] is not None else None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """As extensions/transformer_engine.py has it (TEGroupedLinear): each expert's by itself, keys as of one linear."""
        groups = {"tp_group": parallel_state.get_expert_tensor_parallel_group(), "dp_cp_group": metadata["dp_cp_group"]}
        before, count = (
            parallel_state.get_expert_model_parallel_rank() * len(self.experts),
            parallel_state.get_expert_model_parallel_world_size(),
        )
        single, state, out = metadata.get("singleton_local_shards", False), self.state_dict(keep_vars=True), {}
        for i in self.experts:
            own = {f"{i}.{name}": state[f"{name}{i}"] for name in ("weight", "bias") if f"{name}{i}" in state} | {f"{i}._extra_state": None}
            offsets = sharded_offsets if single else (*sharded_offsets, (len(sharded_offsets), before + i, count * len(self.experts)))
            axes = {f"{i}.weight": self.cut} | ({f"{i}.bias": 0} if self.cut == 0 else {})
            made = make_sharded_tensors_for_checkpoint(own, "", axes, offsets, **groups)
            replace_prefix_for_sharding(made, f"{i}.", f"{before + i}.{prefix}" if single else prefix)
            for name, value in made.items():
                value.replica_id = (*value.replica_id[:2], parallel_state.get_expert_data_parallel_rank())
                out[f"{prefix}{name.removeprefix(f'{i}.')}{i if i or not name.endswith('_extra_state') else ''}"] = value
        return out


class Attention(DotProductAttention):
    """Megatron's own for the CPU, where keys and values may differ in size."""

    def __init__(self, config, *args, k_channels: int | None = None, v_channels: int | None = None, **options):
        super().__init__(config, *args, **options)
        if v_channels:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition


class Provider(LocalSpecProvider):
    """Of Megatron's TransformerEngine spec: which module stands where."""

    def linear(self):
        return Whole

    def column_parallel_linear(self):
        return Column

    def row_parallel_linear(self):
        return Row

    def fuse_layernorm_and_linear(self):
        return True

    def column_parallel_layer_norm_linear(self):
        return NormColumn

    def layer_norm(self, rms_norm=False, for_qk=False, has_residual=False):
        return Norm

    def core_attention(self):
        return Attention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool):
        linears = GroupedMLPSubmodules(linear_fc1=partial(Grouped, cut=0), linear_fc2=partial(Grouped, cut=1), activation_func=None)
        return partial(TEGroupedMLP, submodules=linears)
