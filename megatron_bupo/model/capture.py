"""The residual stream and the outputs of attention and FFN, recorded during a forward by hooks on the layers.

Each pipeline stage records the states of its own layers. The hooks are removed at the end; the model is not changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_bupo.model.build import HiddenStateModel
from megatron_bupo.model.policy import response_rows
from megatron_bupo.samples import MicroBatch


@dataclass
class LayerStates:
    """Around layer l at the rows that predict response tokens: [R, H] each, in the model's dtype, without gradient."""

    layer: TransformerLayer
    below: Tensor  # H_{l-1}
    attn: Tensor  # A_l
    ffn: Tensor  # F_l
    resid: Tensor  # H_l

    @property
    def number(self) -> int:
        """l, from 1 over the whole model."""
        return int(self.layer.layer_number)

    @property
    def middle(self) -> Tensor:
        """M_l = H_{l-1} + A_l."""
        return self.below + self.attn

    @property
    def attn_in(self) -> Tensor:
        """LN1_l(H_{l-1})."""
        return _norm(self.layer.input_layernorm, self.layer.self_attention.linear_qkv, self.below)

    @property
    def ffn_in(self) -> Tensor:
        """LN2_l(M_l)."""
        return _norm(self.layer.pre_mlp_layernorm, self.layer.mlp.linear_fc1, self.middle)


@dataclass
class _Seen:
    """The recorded states of one layer, one for each micro-batch so far.

    `below` is the list `resid` of the layer below; the lowest layer of a chunk has a separate list.
    """

    below: list[Tensor]
    attn: list[Tensor] = field(default_factory=list)
    ffn: list[Tensor] = field(default_factory=list)
    resid: list[Tensor] = field(default_factory=list)


@contextmanager
def captured_states(
    chunks: Sequence[HiddenStateModel], batches: Sequence[MicroBatch]
) -> Iterator[list[list[LayerStates]]]:
    """Record the states of every layer of this stage while `batches` run through `chunks`, in their order.

    Yields:
        A list that is filled when the context ends: for every micro-batch, its states by layer, lowest first.
    """
    result: list[list[LayerStates]] = []
    seen: list[tuple[TransformerLayer, _Seen]] = []
    with ExitStack() as hooks:
        for chunk in chunks:
            below: list[Tensor] = []
            for index, layer in enumerate(chunk.decoder.layers):
                states = _Seen(below)
                for handle in _hooks(chunk, layer, states, batches, is_lowest=index == 0):
                    hooks.callback(handle.remove)
                seen.append((layer, states))
                below = states.resid
        yield result
    for index in range(len(batches)):
        result.append(
            [
                LayerStates(layer, states.below[index], states.attn[index], states.ffn[index], states.resid[index])
                for layer, states in seen
            ]
        )


def _hooks(
    chunk: HiddenStateModel, layer: TransformerLayer, seen: _Seen, batches: Sequence[MicroBatch], is_lowest: bool
) -> list[Any]:
    def keep(states: list[Tensor], state: Tensor) -> None:
        states.append(response_rows(chunk, state.detach(), batches[len(states)]))

    def before(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        keep(seen.below, named["hidden_states"] if "hidden_states" in named else inputs[0])

    def after(module: nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor, Any]) -> None:
        keep(seen.resid, output[0])

    def after_module(states: list[Tensor]) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output_and_bias: tuple[Tensor, Tensor | None]) -> None:
            output, bias = output_and_bias
            keep(states, output if bias is None else output + bias)

        return hook

    lowest = [layer.register_forward_pre_hook(before, with_kwargs=True)] if is_lowest else []
    return [
        *lowest,
        layer.self_attention.register_forward_hook(after_module(seen.attn)),
        layer.mlp.register_forward_hook(after_module(seen.ffn)),
        layer.register_forward_hook(after),
    ]


def _norm(norm: nn.Module, linear: nn.Module, state: Tensor) -> Tensor:
    """The layer's own RMSNorm of rows [R, H]; transformer-engine has its weight in the linear layer behind it."""
    if not isinstance(norm, IdentityOp):
        return norm(state)
    weight: Tensor = linear.layer_norm_weight  # type: ignore[assignment]
    return F.rms_norm(state, weight.shape, weight, float(linear.eps))  # type: ignore[arg-type]
