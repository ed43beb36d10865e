"""entropy_flow.json: what is written is read, and what is no whole flow is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_bupo.analysis.flow_file import FILE_NAME, check_measurable, read_flow, write_flow
from megatron_bupo.errors import UsageError
from megatron_bupo.samples import Rollout
from tests.unit.flows import synthetic_flow

TOKENS = ["The", " answer", "\n", "你"]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    flow = synthetic_flow(4, tokens=TOKENS)
    path = write_flow(tmp_path / "new" / "folder", flow)
    assert path == tmp_path / "new" / "folder" / FILE_NAME
    assert read_flow(path) == read_flow(path.parent) == flow
    assert flow.column("resid") == [layer["resid"] for layer in flow.layers]
    content = json.loads(path.read_text())
    assert list(content)[:4] == ["schema", "model", "vocab_size", "num_responses"]
    assert content["schema"] == 1


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another schema": (lambda c: c.update(schema=2), "is of another schema than 1; measure again"),
    "no schema": (lambda c: c.pop("schema"), "no entropy flow (it has no schema)"),
    "vocabulary": (lambda c: c.update(vocab_size="many"), "vocab_size is 'many'"),
    "no vocabulary": (lambda c: c.update(vocab_size=0), "vocab_size is 0"),
    "model": (lambda c: c.update(model=4), "model is 4"),
    "evidence": (lambda c: c.update(selection=None), "selection is None"),
    "list of stages": (lambda c: c.update(stages=list(c["stages"])), "stages is ['exploration'"),
    "half a layer": (lambda c: c["stages"].update(convergence=[1.5, 4]), "convergence is [1.5, 4], of 4 layers"),
    "huge": (lambda c: c.update(final_entropy=10**400), "too large"),
    "norm in one layer": (lambda c: c["layers"][0].update({"resid@norm": 1.0, "se_resid@norm": 1.0}), "'resid@norm'"),
    "heatmap ids": (lambda c: c["heatmap"].update(tokens=[1, 2, 3, 4]), "the heatmap's tokens are not"),
    "heatmap text": (lambda c: c["heatmap"].update(full=["a", "b", "c", "d"]), "real number"),
    "heatmap nan": (lambda c: c["heatmap"]["resid"][0].__setitem__(2, float("nan")), "token 3 of the heatmap is nan"),
    "one layer": (lambda c: c.update(layers=c["layers"][:1]), "1 layer(s), a flow has 2 or more"),
    "no layers": (lambda c: c.pop("layers"), "layers"),
    "a key more": (lambda c: c.update(colour="red"), "colour"),
    "a gap": (lambda c: c["layers"].pop(1), "the layers are not 1, 2, 3"),
    "a number less": (lambda c: c["layers"][2].pop("d_ffn"), "'d_ffn'"),
    "no number": (lambda c: c["layers"][2].update(d_ffn="high"), "real number"),
    "nan": (lambda c: c["layers"][1].update(se_resid=float("nan")), "se_resid of layer 2 is nan"),
    "embedding": (lambda c: c["embedding"].pop("se_resid"), "'se_resid'"),
    "final entropy": (lambda c: c.update(final_entropy=float("inf")), "final_entropy is inf"),
    "stages": (lambda c: c["stages"].pop("integration"), "the stages are"),
    "stage beyond": (lambda c: c["stages"].update(convergence=[3, 5]), "convergence is [3, 5], of 4 layers"),
    "suggestion": (lambda c: c.update(suggested_layer=5), "suggested_layer is 5, of 4"),
    "heatmap": (lambda c: c["heatmap"]["resid"].pop(), "the heatmap is not 4 layers by 4 tokens"),
    "heatmap row": (lambda c: c["heatmap"]["full"].pop(), "the heatmap is not 4 layers by 4 tokens"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_what_is_no_whole_flow_is_refused(broken: str, tmp_path: Path) -> None:
    change, expected = BROKEN[broken]
    path = write_flow(tmp_path, synthetic_flow(4, tokens=TOKENS))
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError) as refused:
        read_flow(path)
    assert expected in str(refused.value)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"No such file or directory; give an entropy_flow\.json"):
        read_flow(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UsageError, match=r"of a training run give .*/entropy_flow/step_\.\.\. or .*/internal_layer"):
        read_flow(tmp_path)
    for text in ("", "{", "[1]", '"flow"'):
        (tmp_path / "flow.json").write_text(text)
        with pytest.raises(UsageError, match=r"give an entropy_flow\.json that entropy-flow wrote"):
            read_flow(tmp_path / "flow.json")
    (tmp_path / "flow.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not UTF-8 text"):
        read_flow(tmp_path / "flow.json")


def test_two_tokens_that_the_policy_wrote_are_needed() -> None:
    def rollout(*mask: int) -> Rollout:
        return Rollout(0, [1], [2] * len(mask), response_mask=list(mask))

    with pytest.raises(UsageError, match=r"some\.jsonl: no response tokens"):
        check_measurable([rollout(0, 0), rollout(0)], "some.jsonl")
    with pytest.raises(UsageError, match="a single response token"):
        check_measurable([rollout(0, 1), rollout(0)], "some.jsonl")
    check_measurable([rollout(0, 1), rollout(1)], "some.jsonl")
