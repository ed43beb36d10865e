"""A HuggingFace folder and a distributed checkpoint, tensor by tensor, bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_bupo.architectures.mapping import split_layer
from megatron_bupo.conversion.stored_model import Parameter, StoredModel
from megatron_bupo.conversion.workers import Ranks, in_threads
from megatron_bupo.weights.hf_files import HFWeights

_INTEGERS = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class Compared:
    """One tensor: how many of its numbers differ in their bits, and by how much at most."""

    name: str
    dtypes: tuple[torch.dtype, torch.dtype]  # of the source, and as stored
    num_values: int
    num_different: int
    max_difference: float


def compare(weights: HFWeights, stored: StoredModel, ranks: Ranks) -> list[Compared]:
    """Every tensor of the model, in the order of the network, on every rank; the stored one cast to the source's dtype.

    Raises:
        UsageError: a tensor that cannot be read, or has NaN or infinite values.
    """
    parameters = [parameter for parameter in stored.table if parameter[0].export]
    total = sum(weights.dtype(name).itemsize * torch.Size(weights.shape(name)).numel() for name in weights.names)
    with ranks.progress("comparing", total) as done:

        def some(worker: int, mine: Iterator[Parameter]) -> list[Compared]:
            return [one for parameter in mine for one in _compare_parameter(parameter, weights, stored, done)]

        parts = ranks.everywhere(lambda: in_threads(parameters[ranks.rank :: ranks.world_size], some))
    found = {one.name: one for part in parts for worker in part for one in worker}
    return [found[name] for mapping, layer in parameters for name in mapping.hf_names(layer)]


def _compare_parameter(
    parameter: Parameter, weights: HFWeights, stored: StoredModel, done: Callable[[int], None]
) -> Iterator[Compared]:
    mapping, layer = parameter
    for name, tensor in zip(mapping.hf_names(layer), stored.hf_tensors(mapping, layer), strict=True):
        source = weights.slice(name)[:]
        yield _compare_tensors(name, source, tensor)
        done(source.nbytes)


def _compare_tensors(name: str, source: Tensor, tensor: Tensor) -> Compared:
    ours = tensor.to(source.dtype).contiguous()
    kind = _INTEGERS[source.element_size()]
    dtypes = (source.dtype, tensor.dtype)
    if torch.equal(ours.view(kind), source.contiguous().view(kind)):
        return Compared(name, dtypes, source.numel(), 0, 0.0)
    different = int((ours.view(kind) != source.contiguous().view(kind)).sum())
    return Compared(name, dtypes, source.numel(), different, float((ours.double() - source.double()).abs().max()))


def table_text(compared: Iterable[Compared]) -> str:
    """A line a kind of tensor, all layers together, then a line for every tensor that differs."""
    groups: dict[str, list[Compared]] = {}
    different = []
    for one in compared:
        groups.setdefault(split_layer(one.name)[0].format(layer="*"), []).append(one)
        if one.num_different:
            different.append(one)
    width = max(len(name) for name in groups)
    lines = [f"{'tensor':<{width}}  {'number':>6}  {'source':>8}  {'stored':>8}  {'bit-equal':>9}"]
    for name, group in groups.items():
        equal = sum(not one.num_different for one in group)
        kinds = [_spelled({one.dtypes[side] for one in group}) for side in (0, 1)]
        lines.append(f"{name:<{width}}  {len(group):>6}  {kinds[0]:>8}  {kinds[1]:>8}  {equal:>9}")
    for one in different:
        share = f"{one.num_different} of {one.num_values} values differ, by at most {one.max_difference:.3g}"
        lines.append(f"{one.name}: {share}")
    return "\n".join(lines)


def _spelled(dtypes: set[torch.dtype]) -> str:
    return str(dtypes.pop()).removeprefix("torch.") if len(dtypes) == 1 else "mixed"
