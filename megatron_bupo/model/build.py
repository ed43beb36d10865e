"""From an Architecture to megatron-core model chunks, with the local or the transformer-engine layer spec."""

from __future__ import annotations

import sys
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch import Tensor, nn

from megatron_bupo.architectures.architecture import Architecture
from megatron_bupo.config.train import ParallelConfig
from megatron_bupo.ops import transformer_engine
from megatron_bupo.ops.attention import PackedAttention
from megatron_bupo.ops.lean_layers import RMSNorm, SwiGLU
from megatron_bupo.parallel.setup import ParallelState


class HiddenStateModel(GPTModel):
    """A GPTModel that ends at the hidden state: `policy.py` unembeds only the rows that predict response tokens."""

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


def transformer_config(arch: Architecture, parallel: ParallelConfig, dtype: torch.dtype) -> TransformerConfig:
    """The TransformerConfig of a model in a layout; `dtype` is that of parameters and activations."""
    virtual = parallel.num_virtual_stages_per_pipeline_rank
    has_te = transformer_engine.is_used(dtype)
    return TransformerConfig(
        **arch.transformer_config_kwargs(),
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        sequence_parallel=parallel.sequence_parallel,
        recompute_granularity=parallel.recompute_granularity,
        recompute_method=parallel.recompute_method,
        recompute_num_layers=parallel.recompute_num_layers,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=False,  # every parameter is loaded
        # The loss is a sum over tokens divided by the number of tokens in the global mini-batch, in every layout.
        calculate_per_token_loss=True,
        # megatron-core's name for "the activation is a module of the layer spec": ops/lean_layers.py's.
        use_te_activation_func=not has_te,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=has_te,
        persist_layer_norm=False,
        bias_activation_fusion=has_te,  # SwiGLU that keeps its input alone
        bias_dropout_fusion=False,
        # Anything else gives silently wrong numbers on gloo with virtual stages.
        overlap_p2p_comm=False,
        batch_p2p_comm=False,
        cuda_graph_scope=[],  # the default is a deprecated spelling of the same
    )


def _layer_spec(arch: Architecture, dtype: torch.dtype) -> ModuleSpec:
    if transformer_engine.is_used(dtype):
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=arch.qk_norm)
        if transformer_engine.other_cudnn() is not None:
            spec.submodules.self_attention.submodules.core_attention = PackedAttention
        return spec
    spec = get_gpt_layer_local_spec(qk_layernorm=arch.qk_norm, normalization="RMSNorm")
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    spec.submodules.mlp.submodules.activation_func = SwiGLU
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    if arch.qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return spec


def _mark_tensor_parallel(model: nn.Module) -> None:
    """Mark the parameters that are slices, for norms: megatron-core does so only when it initializes them."""
    for module in model.modules():
        dimension = 1 if isinstance(module, RowParallelLinear) else 0
        if isinstance(module, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding):
            weight = module.weight
            if weight is not None and not hasattr(weight, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(weight, True, dimension, 1)


def build_model(
    arch: Architecture, parallel: ParallelConfig, state: ParallelState, dtype: torch.dtype
) -> list[HiddenStateModel]:
    """The model chunks of this rank, one per virtual stage, with parameters that still have to be loaded."""
    config = transformer_config(arch, parallel, dtype)
    layer_spec, has_te = _layer_spec(arch, dtype), transformer_engine.is_used(dtype)
    if has_te and state.rank == 0 and (warning := transformer_engine.other_cudnn()) is not None:
        print(f"warning: {warning}", file=sys.stderr)
    chunks = []
    for virtual_stage in range(state.vpp_size):
        is_first = state.pp_rank == 0 and virtual_stage == 0
        is_last = state.is_last_stage and virtual_stage == state.vpp_size - 1
        vp_stage = virtual_stage if state.vpp_size > 1 else None
        block: ModuleSpec | TransformerBlockSubmodules = layer_spec
        if not has_te:
            num_layers = get_num_layers_to_build(config, vp_stage)
            block = TransformerBlockSubmodules(layer_specs=[layer_spec] * num_layers, layer_norm=RMSNorm)
        model = HiddenStateModel(
            config=config,
            transformer_layer_spec=block,
            vocab_size=arch.padded_vocab_size(state.tp_size),
            max_sequence_length=arch.max_position_embeddings,
            pre_process=is_first,
            post_process=is_last,
            share_embeddings_and_output_weights=arch.tied,
            position_embedding_type="rope",
            rotary_base=arch.rope_theta,
            vp_stage=vp_stage,
        )
        # megatron-core's own rope scaling has Llama 3.1's constants built in; ours reads them from the config.
        model.rotary_pos_emb.inv_freq = arch.rope_inv_freq().to(state.device)
        _mark_tensor_parallel(model)
        chunks.append(model)
    return chunks
