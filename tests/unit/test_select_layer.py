"""`select-layer` on flows written for it: what it prints, and how it ends."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from megatron_bupo.__main__ import main
from megatron_bupo.analysis.flow_file import write_flow
from megatron_bupo.analysis.stages import select_layer
from tests.unit.flows import synthetic_flow

PUBLISHED = [0.5] * 6 + [0.0] * 20 + [-1.25] * 10


def flow_of(d_ffn, resid, final_entropy, responses=None, num_tokens=None):
    """A flow with these columns, and with the stages and the evidence that belong to them."""
    flow = synthetic_flow(len(d_ffn))
    layers = [
        {**layer, "d_ffn": float(change), "se_d_ffn": 0.0125, "resid": float(entropy)}
        for layer, change, entropy in zip(flow.layers, d_ffn, resid, strict=True)
    ]
    chosen = select_layer(d_ffn, resid, final_entropy, responses, num_tokens)
    return dataclasses.replace(
        flow,
        layers=layers,
        final_entropy=final_entropy,
        stages=chosen.stages,
        suggested_layer=chosen.suggested_layer,
        selection=chosen.evidence,
    )


def published_flow(**responses):
    return flow_of(PUBLISHED, np.linspace(10.5, 0.4, 36), 0.3, **responses)


def printed(flow, folder, capsys):
    write_flow(folder, flow)
    assert main(["select-layer", "--flow", str(folder)]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    return [line.split() for line in output.out.splitlines()], output.out


def test_the_suggestion_and_its_evidence(tmp_path, capsys):
    responses = {"responses": np.tile(PUBLISHED, (8, 1)), "num_tokens": np.ones(8)}
    lines, text = printed(published_flow(**responses), tmp_path, capsys)
    assert "Qwen3-4B: 36 layers, 2048 tokens of 8 responses\n" in text
    assert "suggested layer: 6, to train it: --internal-layer 6" in text
    assert ["exploration", "1-6", "+0.500"] in lines
    assert ["integration", "7-26", "+0.000"] in lines
    assert ["convergence", "27-36", "-1.250"] in lines
    assert "not abrupt: the entropy falls from 10.500 nats" in text
    assert "layer 6 is the last of the exploration stage, with d_ffn +0.500" in text
    assert "stages stable: of 1000 resamples of 8 responses" in text
    assert ["5", f"{10.5 - 4 * 10.1 / 35:.3f}", "+0.500", "0.0125", "exploration"] in lines
    assert ["6", f"{10.5 - 5 * 10.1 / 35:.3f}", "+0.500", "0.0125", "exploration", "<-", "suggested"] in lines
    assert ["36", "0.400", "-1.250", "0.0125", "convergence"] in lines
    assert ["full", "0.300"] in lines
    assert text.count("<- suggested") == 1


def test_the_bootstrap_counts_only_for_the_stages_it_judged(tmp_path, capsys):
    responses = {"responses": np.tile(PUBLISHED, (8, 1)), "num_tokens": np.ones(8)}
    flow = published_flow(**responses)
    other = {**flow.stages, "exploration": [1, 7], "integration": [8, 26]}
    for changed in (dataclasses.replace(flow, stages=other), dataclasses.replace(flow, selection={})):
        _, text = printed(changed, tmp_path, capsys)
        assert "stages not judged" in text
        assert "resamples" not in text
        assert "suggested layer: 6," in text


def test_an_abrupt_model(tmp_path, capsys):
    _, text = printed(flow_of([0.1] * 28, [11.0] * 27 + [1.0], 0.3), tmp_path, capsys)
    assert "--internal-layer 27" in text
    assert "abrupt: the entropy falls from 11.000 nats" in text
    assert "in the first 27 of 28 layers" in text


def test_nothing_suggested_is_an_answer(tmp_path, capsys):
    lines, text = printed(flow_of([0.0, -1.0, -1.0], [3.0, 2.0, 1.0], 0.9), tmp_path, capsys)
    assert ["suggested", "layer:", "none"] in lines
    assert "no layer is suggested: the best fit has no exploration stage" in text
    assert ["exploration", "none"] in lines
    assert ["integration", "1", "+0.000"] in lines
    assert "--internal-layer" not in text
    assert "<-" not in text


def test_what_cannot_be_read_is_one_line(tmp_path, capsys):
    path = write_flow(tmp_path, published_flow())
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "layers": content["layers"][:1]}))
    for given, message in ((path, "1 layer"), (tmp_path / "none.json", "No such file")):
        assert main(["select-layer", "--flow", str(given)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


@pytest.mark.parametrize("num_layers", [2, 4, 80])
def test_every_size_is_printed(num_layers, tmp_path, capsys):
    lines, _ = printed(synthetic_flow(num_layers), tmp_path, capsys)
    assert [line[0] for line in lines[-num_layers - 1 : -1]] == [str(layer) for layer in range(1, num_layers + 1)]


def test_it_starts_without_torch():
    code = "import sys, megatron_bupo.commands.select_layer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
