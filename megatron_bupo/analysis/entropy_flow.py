"""Measuring the entropy flow inside a model, in any layout: means by layer over the tokens that the model generated.

model/capture.py   takes the states        flow_tokens.py   means and single tokens    flow_plots.py, heatmap.py
model/flow.py      reduces them             stages.py        the suggested layer         figures
this file          goes over the rollouts   flow_file.py     the numbers as json         flow_log.py   in training
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch.distributed as dist
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from megatron_bupo.analysis.flow_file import (
    HEATMAP_TOKENS,
    METRICS,
    NORM_METRICS,
    EntropyFlow,
    Heatmap,
    check_measurable,
)
from megatron_bupo.analysis.flow_tokens import SINGLE_NAMES, FlowTotals, TokenValues
from megatron_bupo.analysis.stages import select_layer
from megatron_bupo.data.packing import pack_for
from megatron_bupo.model.capture import captured_states
from megatron_bupo.model.flow import TokenFlow, UnembeddingEverywhere, token_flow
from megatron_bupo.model.parallel_model import ParallelModel
from megatron_bupo.model.policy import response_rows, run_schedule
from megatron_bupo.policy_spec import PolicySpec
from megatron_bupo.samples import MicroBatch, Rollout


@dataclass(frozen=True)
class FlowMeasurement:
    """What was measured, the same on every rank but for `tokens`.

    `mean` and `standard_error` have float64 [L] for each name of METRICS, [1] for embedding_resid,
    embedding_resid_norm and full. `d_ffn_sums` float64 [N, L] has each response's sum over its tokens, `num_tokens` [N]
    their number. `tokens` are those asked for, on the first rank.
    """

    vocab_size: int
    mean: dict[str, np.ndarray]
    standard_error: dict[str, np.ndarray]
    d_ffn_sums: np.ndarray
    num_tokens: np.ndarray
    tokens: TokenValues | None

    def summary(self, model: str, heatmap: Heatmap | None = None) -> EntropyFlow:
        """The content of entropy_flow.json, with stages and suggested layer."""
        names = [name for name in (*METRICS, *NORM_METRICS) if name in self.mean]
        layers: list[dict[str, float]] = []
        for index in range(self.d_ffn_sums.shape[1]):
            numbers = {name: float(self.mean[name][index]) for name in names}
            errors = {f"se_{name}": float(self.standard_error[name][index]) for name in names}
            layers.append({"layer": index + 1, **numbers, **errors})
        single = {name: float(self.mean[name][0]) for name in SINGLE_NAMES}
        single |= {f"se_{name}": float(self.standard_error[name][0]) for name in SINGLE_NAMES}
        selection = select_layer(
            self.mean["d_ffn"].tolist(), self.mean["resid"].tolist(), single["full"], self.d_ffn_sums, self.num_tokens
        )
        return EntropyFlow(
            model=model,
            vocab_size=self.vocab_size,
            num_responses=int(np.count_nonzero(self.num_tokens)),
            num_tokens=int(self.num_tokens.sum()),
            final_entropy=single["full"],
            se_final_entropy=single["se_full"],
            embedding={
                "resid": single["embedding_resid"],
                "se_resid": single["se_embedding_resid"],
                "resid_norm": single["embedding_resid_norm"],
                "se_resid_norm": single["se_embedding_resid_norm"],
            },
            layers=layers,
            stages=selection.stages,
            suggested_layer=selection.suggested_layer,
            selection=selection.evidence,
            heatmap=heatmap,
        )

    def heatmap(self, number: int, tokenizer: PreTrainedTokenizerBase | None) -> Heatmap:
        """The entropies along the beginning of one response, from 1, whose tokens were kept; on the first rank.

        Without a tokenizer the tokens' ids stand for their text.
        """
        assert self.tokens is not None, "only the first rank has the tokens, if they are asked for"
        tokens = self.tokens.of_response(number)
        ids = tokens.token[:HEATMAP_TOKENS].tolist()
        text = [str(token) if tokenizer is None else tokenizer.decode([token]) for token in ids]
        beginning = (tokens.values[name][:, :HEATMAP_TOKENS] for name in ("resid", "full"))
        resid, full = (values.astype(float).round(4).tolist() for values in beginning)
        return Heatmap(number, len(tokens.token), text, resid, full[0])


def measure(
    model: ParallelModel,
    rollouts: list[Rollout],
    max_tokens: int,
    *,
    final_norm: bool = False,
    per_token: bool = False,
    heatmap: int | None = None,
    progress: bool = False,
) -> FlowMeasurement:
    """Measure the flow at the positions that predict the tokens which the policy wrote. Collective over all ranks.

    Args:
        max_tokens: of a micro-batch, whose states are kept until they are reduced: 3 L times H numbers a token.
        final_norm: also the policies behind the final norm (the paper's ablation).
        per_token: keep the values of every token.
        heatmap: keep those of this response, from 1.
        progress: a bar on the first rank.

    Raises:
        UsageError: fewer than two such tokens.
    """
    check_measurable(rollouts, "the rollouts to measure on")
    state, num_layers = model.state, model.arch.num_layers
    unembedding = UnembeddingEverywhere(model.chunks, state, model.arch.vocab_size)
    batches = [_generated_only(batch) for batch in pack_for(state, rollouts, max_tokens)]
    totals = FlowTotals(len(rollouts), num_layers)
    kept: list[TokenValues] = []
    num_rows = sum(len(batch.rows) for batch in batches)
    with tqdm(total=num_rows, desc="entropy flow", unit=" tok", disable=not progress or state.rank > 0 or None) as bar:
        for batch, flow in _flows(model, unembedding, batches, final_norm):
            bar.update(len(batch.rows))
            if not state.reports:
                continue
            tokens = TokenValues.of(batch, flow)
            totals.add(tokens)
            if per_token:
                kept.append(tokens)
            elif heatmap is not None:
                kept.append(tokens.of_response(heatmap))
    names = dict.fromkeys((*METRICS, *(NORM_METRICS if final_norm else ())), num_layers) | dict.fromkeys(
        SINGLE_NAMES, 1
    )
    totals.reduce(names, state.host_group)
    mean, standard_error = totals.means()
    tokens_of_all = _on_first_rank(kept, model)
    return FlowMeasurement(
        model.arch.vocab_size, mean, standard_error, totals.d_ffn_sums, totals.num_tokens, tokens_of_all
    )


def _generated_only(batch: MicroBatch) -> MicroBatch:
    """Without the rows of tokens that the policy did not write."""
    kept = batch.mask > 0
    return replace(batch, **{name: getattr(batch, name)[kept] for name in ("rows", "targets", "segments", "mask")})


def _flows(
    model: ParallelModel, unembedding: UnembeddingEverywhere, batches: Sequence[MicroBatch], final_norm: bool
) -> Iterator[tuple[MicroBatch, TokenFlow]]:
    """Every micro-batch with its flow, on all ranks. Virtual stages take as many at a time as the pipeline is deep."""
    state = model.state
    at_once = state.pp_size if state.vpp_size > 1 else 1
    for start in range(0, len(batches), at_once):
        group = batches[start : start + at_once]
        with captured_states(model.chunks, group) as states:
            finals = run_schedule(
                model.chunks,
                group,
                PolicySpec(),
                state,
                lambda view, hidden, batch: (response_rows(view, hidden, batch), lambda rows, non_loss_data: rows),
                forward_only=True,
            )
        for index, batch in enumerate(group):
            final = finals[index] if state.is_last_stage else None
            yield batch, token_flow(unembedding, states[index], final, final_norm)


def _on_first_rank(kept: list[TokenValues], model: ParallelModel) -> TokenValues | None:
    """All that was kept, on the first rank."""
    state = model.state
    mine = TokenValues.joined(kept) if kept else None
    parts: list[TokenValues | None] | None = [None] * state.world_size if state.rank == 0 else None
    dist.gather_object(mine, parts, dst=0, group=state.host_group)
    found = [part for part in parts or [] if part is not None]
    return TokenValues.joined(found) if found else None
