"""Views of a model that end at an internal policy.

A view of a GPTModel is a shallow copy that shares every parameter and has fewer layers: for `layer:l` the layers with
global number <= l and no final norm. A pipeline stage with none of them passes the hidden state on, so megatron-core's
schedules and message shapes stay as they are, and nothing above l is computed. Under activation recompute the
backward runs the layers of the view again: the view itself is what the recompute remembers, so it holds there too.

For `attn:l` and `ffn:l` the last layer of the view hands out its module's output without the residual stream.

The model itself is never changed. Its hooks and gradient buffers sit on the parameters, which are the same.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import TypeVar

from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from megatron_bupo.model.build import HiddenStateModel
from megatron_bupo.policy_spec import PolicySpec

Module = TypeVar("Module", bound=nn.Module)


def _shallow_copy(module: Module) -> Module:
    """A copy with its own attributes and table of submodules, which are the same objects."""
    view = copy.copy(module)
    view.__dict__["_modules"] = dict(module._modules)
    return view


def _module_output(training: bool, fused: bool) -> Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]:
    """In place of megatron-core's bias-dropout-add: the module's output alone."""

    def output_without_residual(output_and_bias: tuple[Tensor, Tensor | None], residual: Tensor, prob: float) -> Tensor:
        output, bias = output_and_bias
        return output if bias is None else output + bias

    return output_without_residual


def _layer_view(layer: TransformerLayer, module: str) -> TransformerLayer:
    """The layer with A_l (module "attn") or F_l ("ffn") as its output."""
    view = _shallow_copy(layer)
    if module == "attn":
        view.self_attn_bda = _module_output
        view.pre_mlp_layernorm = IdentityOp()
        view.mlp = IdentityOp()
        view.mlp_bda = IdentityFuncOp()
        # Nothing is left of these modules to recompute.
        view.recompute_pre_mlp_layernorm = view.recompute_mlp = False
    else:
        view.mlp_bda = _module_output
    return view


def _block_view(block: TransformerBlock, spec: PolicySpec) -> TransformerBlock:
    view = _shallow_copy(block)
    assert spec.layer is not None
    kept = [layer for layer in block.layers if layer.layer_number <= spec.layer]
    if spec.module != "layer" and kept and kept[-1].layer_number == spec.layer:
        kept[-1] = _layer_view(kept[-1], spec.module)
    view.layers = nn.ModuleList(kept)
    view.num_layers_per_pipeline_rank = len(kept)
    if not spec.norm:
        view.final_layernorm = None
    if block.config.recompute_method == "uniform":
        # megatron-core walks in chunks of recompute_num_layers and would run past the end of the view.
        view.config = copy.copy(block.config)
        view.config.recompute_num_layers = math.gcd(len(kept), block.config.recompute_num_layers)
    return view


def view_for(model: HiddenStateModel, spec: PolicySpec) -> HiddenStateModel:
    """The model cut to what the policy `spec` needs; the model itself for the full policy.

    Of a stage with layers 1 to 12 of 36, the view for layer:6 has layers 1 to 6, and no final norm.
    """
    if spec.is_full:
        return model
    view = _shallow_copy(model)
    view.decoder = _block_view(model.decoder, spec)
    return view
