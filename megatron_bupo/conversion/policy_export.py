"""An internal policy as a HuggingFace model of its own: the layers up to l, the unembedding, a small modeling file.

The folder needs trust_remote_code: without it a stock class would load the same weights and put the final norm back in.
Its own model type sees to it that transformers refuses instead.
"""

from __future__ import annotations

import json
from pathlib import Path
from string import Template

import torch

from megatron_bupo.architectures.families import families, read_architecture
from megatron_bupo.architectures.family import FINAL_NORM
from megatron_bupo.architectures.table import WeightTable, table_for
from megatron_bupo.conversion.convert import write_stored
from megatron_bupo.conversion.stored_model import StoredModel
from megatron_bupo.conversion.workers import Ranks
from megatron_bupo.policy_spec import PolicySpec
from megatron_bupo.weights.checkpoint_tree import find_checkpoint
from megatron_bupo.weights.hf_folder import HFFolder
from megatron_bupo.weights.tensor_map import TensorMap

MODEL_TYPE, MODULE = "internal_policy", "modeling_internal_policy"
_MODELING = Template('''"""The internal policy $policy of a $family model: softmax of $formula.

Written by megatron_bupo. Load it with AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True).
"""

from torch import nn
from transformers import $config, $model


class InternalPolicyConfig($config):
    model_type = "$model_type"


class InternalPolicyForCausalLM($model):
    """The layers up to the policy's; its state goes to the unembedding$norm_words."""

    config_class = InternalPolicyConfig

    def __init__(self, config):
        super().__init__(config)
        module = config.internal_policy.partition(":")[0]
        if not config.internal_policy.endswith("@norm"):
            self.model.norm = nn.Identity()
        if module != "layer":
            last = self.model.layers[-1]
            part = last.self_attn if module == "attn" else last.mlp
            part.register_forward_hook(self._keep)
            last.register_forward_hook(self._replace)

    def _keep(self, part, inputs, output):
        self._kept = output[0] if isinstance(output, tuple) else output

    def _replace(self, layer, inputs, output):
        """The module's output in place of the layer's, without the residual stream."""
        kept, self._kept = self._kept, None
        return (kept, *output[1:]) if isinstance(output, tuple) else kept
''')
_STATES = {"layer": "H", "attn": "A", "ffn": "F"}


def export_policy(
    checkpoint: str | Path,
    output: str | Path,
    spec: PolicySpec,
    ranks: Ranks,
    dtype: torch.dtype | None = None,
    force: bool = False,
) -> int:
    """Write a HuggingFace folder whose logits are those of an internal policy (layer:6: H_6 W^T).

    Returns:
        The number of bytes of its tensors.

    Raises:
        UsageError: as `megatron_to_hf`; a policy above the last layer.
    """
    assert not spec.is_full
    found = find_checkpoint(checkpoint)
    arch = read_architecture(found.hf)
    spec.check(arch.num_layers)
    stored = StoredModel(found.folder, table_for(arch))
    source = TensorMap.read(found.hf, stored.table)
    dtypes = stored.hf_dtypes() | (source.dtypes() if source is not None and found.converted else {})
    names = _names(stored.table, spec)
    shapes = stored.table.hf_shapes()
    tensors = TensorMap.sharded((name, shapes[name], dtype or dtypes[name]) for name in names)
    texts = {f"{MODULE}.py": modeling_file(arch.family, spec)}
    target = HFFolder(tensors, found.hf, config_changes=_config_changes(found.hf, spec), texts=texts)
    return write_stored(stored, target, output, ranks, force)


def modeling_file(model_type: str, spec: PolicySpec) -> str:
    """The source text of the exported folder's modeling file."""
    family, state = families()[model_type], f"{_STATES[spec.module]}_{spec.layer}"
    return _MODELING.substitute(
        policy=spec,
        family=model_type,
        formula=f"norm({state}) W^T" if spec.norm else f"{state} W^T",
        model=family.model_class,
        config=family.config_class,
        model_type=MODEL_TYPE,
        norm_words=", through the final norm" if spec.norm else " as it is",
    )


def _names(table: WeightTable, spec: PolicySpec) -> list[str]:
    """The tensors that the policy needs, in the order of the network."""
    assert spec.layer is not None
    kept: dict[str, None] = {}
    for mapping, layer in table:
        if (layer is None and (mapping is not FINAL_NORM or spec.norm)) or (layer is not None and layer < spec.layer):
            kept.update(dict.fromkeys(mapping.hf_names(layer)))
    return list(kept)


def _config_changes(hf: Path, spec: PolicySpec) -> dict[str, object]:
    config = json.loads((hf / "config.json").read_text(encoding="utf-8"))
    changes: dict[str, object] = {
        "model_type": MODEL_TYPE,
        "architectures": ["InternalPolicyForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{MODULE}.InternalPolicyConfig",
            "AutoModelForCausalLM": f"{MODULE}.InternalPolicyForCausalLM",
        },
        "num_hidden_layers": spec.layer,
        "internal_policy": str(spec),
    }
    if isinstance(config.get("layer_types"), list):
        changes["layer_types"] = config["layer_types"][: spec.layer]
    return changes
