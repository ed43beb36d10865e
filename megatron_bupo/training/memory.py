"""What a rank's memory holds while it trains, estimated from config.json and the flags.

Activations are counted tensor by tensor, as the layers of model/build.py, ops/lean_layers.py and ops/attention.py keep
them for the backward; tests/parallel/memory_worker.py counts what autograd really saves. transformer-engine's layers
keep a little less.
"""

from __future__ import annotations

from collections.abc import Iterable

from megatron_bupo.architectures.architecture import Architecture
from megatron_bupo.config.train import ParallelConfig, TrainConfig
from megatron_bupo.ops.tiles import CUDA_TILE
from megatron_bupo.policy_spec import PolicySpec

_FP32 = 4


def parameter_counts(arch: Architecture) -> dict[str, int]:
    """Parameters of one layer, of the embedding and of an unembedding of its own (0 if tied)."""
    heads, groups = arch.num_attention_heads, arch.num_query_groups
    attention = arch.hidden_size * arch.head_dim * (2 * heads + 2 * groups)
    bias = arch.head_dim * (heads + 2 * groups) if arch.qkv_bias else 0
    norms = 2 * arch.hidden_size + (2 * arch.head_dim if arch.qk_norm else 0)
    embedding = arch.vocab_size * arch.hidden_size
    return {
        "layer": attention + bias + norms + 3 * arch.hidden_size * arch.ffn_hidden_size,
        "embedding": embedding,
        "unembedding": 0 if arch.tied else embedding,
    }


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """How many replicas of the model `world_size` processes make, at least one."""
    return max(world_size // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size), 1)


def layer_input_bytes(arch: Architecture, parallel: ParallelConfig, width: int) -> float:
    """Bytes a token of the hidden state between layers on one rank; `width` is bytes a number."""
    return width * arch.hidden_size / (parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1)


def layer_bytes(arch: Architecture, parallel: ParallelConfig, width: int, *, one_call: bool) -> float:
    """Bytes a token that one layer keeps on one rank for its backward.

    Args:
        width: bytes a number: 2 in 16 bit, 4 in fp32.
        one_call: whether attention is one call for all sequences; otherwise the outputs are also kept joined.
    """
    tensor = parallel.tensor_model_parallel_size
    stream = layer_input_bytes(arch, parallel, width)
    query, key = arch.query_size, arch.kv_size
    # Both norms: their input, their output for the linear layer behind them, 1 / rms in fp32.
    norms = 4 * stream + 2 * _FP32 / (tensor if parallel.sequence_parallel else 1)
    # Query and key before their norms, and 1 / rms of each head.
    head_norms = width * (query + key) + _FP32 * (arch.num_attention_heads + arch.num_query_groups)
    rope = 4 * width * arch.head_dim  # cosines and sines, once for query and once for key
    if parallel.recompute_granularity == "selective":
        # Attention runs again: of value the fused projection's whole output is kept, of which it is a part.
        attention = width * (3 * query + 3 * key)
    else:
        outputs = query if one_call else 2 * query
        attention = width * (query + 2 * key + outputs) + _FP32 * arch.num_attention_heads
    feed_forward = width * 3 * arch.ffn_hidden_size  # gate and up, and their product
    spread = (head_norms if arch.qk_norm else 0.0) + attention + feed_forward
    return norms + rope + spread / tensor


def stage_bytes(
    arch: Architecture, parallel: ParallelConfig, width: int, num_layers: int, *, one_call: bool
) -> tuple[float, float]:
    """Bytes a token that `num_layers` layers in a row keep until their backward, and what is added in the backward.

    With full recompute these are the inputs of the pieces, and the activations of one piece.
    """
    layer, between = layer_bytes(arch, parallel, width, one_call=one_call), layer_input_bytes(arch, parallel, width)
    count = parallel.recompute_num_layers
    if parallel.recompute_granularity != "full" or count is None:
        return num_layers * layer, 0.0
    # A piece's input is the first of the activations that are made again.
    if parallel.recompute_method == "uniform":
        return -(-num_layers // count) * between, min(count, num_layers) * layer - between
    kept = num_layers - min(count, num_layers)
    return (num_layers - kept) * between + kept * layer, layer - between if kept == 0 else 0.0


def pieces_in_flight(parallel: ParallelConfig, pp_rank: int = 0) -> int:
    """How many micro-batches a pipeline rank holds at once, at most; with virtual stages, of one virtual stage each."""
    pipeline, virtual = parallel.pipeline_model_parallel_size, parallel.num_virtual_stages_per_pipeline_rank
    behind = pipeline - pp_rank - 1
    return behind + 1 if virtual == 1 else 2 * behind + (virtual - 1) * pipeline + 1


def activation_bytes(
    arch: Architecture, parallel: ParallelConfig, width: int, tokens: int, num_layers: int, *, one_call: bool
) -> float:
    """Bytes on the rank that holds most, of micro-batches of `tokens` through the first `num_layers` layers."""
    stages = parallel.pipeline_model_parallel_size * parallel.num_virtual_stages_per_pipeline_rank
    in_stage = min(num_layers, arch.num_layers // stages)
    kept, more = stage_bytes(arch, parallel, width, in_stage, one_call=one_call)
    return tokens * (pieces_in_flight(parallel) * kept + more)


def unembedding_bytes(arch: Architecture, parallel: ParallelConfig, width: int, rows: int) -> float:
    """Bytes of the unembedding at most, in its backward on a GPU, beside the weights and activations of the layers."""
    hidden, vocab = arch.hidden_size, arch.vocab_size / parallel.tensor_model_parallel_size
    tiles = 2 * _FP32 * min(rows, CUDA_TILE[0]) * min(vocab, CUDA_TILE[1])
    in_fp32 = _FP32 * hidden * min(vocab, CUDA_TILE[1]) if width < _FP32 else 0.0
    return tiles + in_fp32 + rows * hidden * (width + _FP32) + width * hidden * vocab


def trained_share(arch: Architecture, specs: Iterable[PolicySpec]) -> float:
    """The share of the layers that policies train: 1/6 for layer:6 of 36."""
    return max(arch.num_layers if spec.layer is None else spec.layer for spec in specs) / arch.num_layers


def memory_estimate(
    config: TrainConfig, arch: Architecture, world_size: int, specs: tuple[PolicySpec, ...] = (PolicySpec(),)
) -> dict[str, float]:
    """Bytes on the rank that holds most while the last of `specs` trains, after the ones before it have."""
    parallel = config.parallel
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    data_parallel = data_parallel_size(parallel, world_size)
    counts = parameter_counts(arch)
    # In a pipeline the first and the last stage hold one matrix of the vocabulary's size each, tied or not.
    ends = counts["embedding"] + (counts["unembedding"] if pipeline == 1 else 0)
    in_layers = counts["layer"] * arch.num_layers / pipeline
    parameters = (in_layers + ends) / tensor
    width = 2 if config.model.bf16 else _FP32
    # The fp32 masters of bf16 weights are there from the start, Adam's moments where something has trained.
    with_moments = (in_layers * trained_share(arch, specs) + ends) / tensor
    state = with_moments * 8 + (parameters * 4 if config.model.bf16 else 0)
    if config.optimizer.use_distributed_optimizer:
        state /= data_parallel
    tokens = config.batch.max_tokens_per_micro_batch
    layers = arch.num_layers if specs[-1].layer is None else specs[-1].layer
    sizes = {
        "parameters": parameters * width,
        "gradients (fp32)": parameters * _FP32,
        "optimizer (fp32)": state,
        # In 16 bit it is a GPU that trains.
        "activations": activation_bytes(arch, parallel, width, tokens, layers, one_call=config.model.bf16),
        "unembedding": unembedding_bytes(arch, parallel, width, tokens),
    }
    if config.monitor.norms_interval:
        counted = parameters / data_parallel
        # With one optimizer step in a step, the values before it are kept while there are no activations.
        free = 0.0 if config.updates_per_step > 1 else sizes["activations"] + sizes["unembedding"]
        sizes["update norms"] = max(0.0, 4 * counted - free) + (2 * counted if config.model.bf16 else 0)
    if config.rollout.load_rollouts is None and config.rollout.rollout_engine == "local":
        whole = counts["layer"] * arch.num_layers + counts["embedding"] + counts["unembedding"]
        sizes["embedded engine's model"] = float(whole * width)
    return sizes | {"sum": sum(sizes.values())}
