"""What a HuggingFace config.json says about the network, and a refusal by name of what this project does not cover.

Plain JSON in, plain numbers out: neither transformers nor Megatron is needed to read a folder, so that every check
runs before a process group exists. `Architecture` is what the weight table, the model builder and the checks of the
command line share.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_bupo.config.train import ParallelConfig
from megatron_bupo.errors import UsageError

FAMILIES = {"qwen3": "Qwen3ForCausalLM", "qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}
_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_DEFAULT_ROPE_THETA = 10000.0  # of all three families in transformers
_QWEN3_HEAD_DIM = 128  # what transformers' Qwen3Config takes where the file has no head_dim


@dataclass(frozen=True)
class Architecture:
    """One dense decoder of the Llama family, in the field's terms.

    `vocab_size` is that of the checkpoint, without padding. `rope_scaling` is None or the four numbers of llama3's
    scaling: factor, low_freq_factor, high_freq_factor, original_max_position_embeddings. `tied`: the unembedding is
    the embedding. `qkv_bias`: biases on q, k and v alone. `qk_norm`: RMSNorm over head_dim on queries and keys.
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rope_theta: float
    rope_scaling: dict[str, float] | None = field(hash=False)
    norm_eps: float
    tied: bool
    qkv_bias: bool
    qk_norm: bool

    @classmethod
    def from_hf(cls, folder: str | Path) -> Architecture:
        """Read FOLDER/config.json, as written by transformers 4 or 5.

        Raises:
            UsageError: no such file, no JSON, a key missing or impossible, or anything in it that the weight table
                and the model builder do not cover (the line names it).
        """
        config = _Config.read(Path(folder))
        family = config.family()
        config.refuse_uncovered(family)
        hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
        groups = config.integer("num_key_value_heads", default=heads if family == "llama" else None, null=heads)
        if heads % groups:
            config.fail(f"num_attention_heads {heads} is no multiple of num_key_value_heads {groups}")
        if not config.data.get("head_dim") and family != "qwen3" and hidden % heads:
            config.fail(f"hidden_size {hidden} is no multiple of num_attention_heads {heads}, and there is no head_dim")
        head_dim = config.integer("head_dim", default=_QWEN3_HEAD_DIM if family == "qwen3" else max(1, hidden // heads))
        if head_dim % 2:
            config.fail(f"head_dim is {head_dim}; rotary embeddings need an even one")
        theta, scaling = config.rope()
        return cls(
            family=family,
            num_layers=config.integer("num_hidden_layers"),
            hidden_size=hidden,
            ffn_hidden_size=config.integer("intermediate_size"),
            num_attention_heads=heads,
            num_query_groups=groups,
            head_dim=head_dim,
            vocab_size=config.integer("vocab_size"),
            max_position_embeddings=config.integer("max_position_embeddings"),
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=config.number("rms_norm_eps"),
            tied=config.flag("tie_word_embeddings"),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
        )

    @property
    def query_size(self) -> int:
        """Width of all query heads together: rows of q_proj, columns of o_proj."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of k_proj and of v_proj."""
        return self.num_query_groups * self.head_dim

    def padded_vocab_size(self, tp: int) -> int:
        """The vocabulary padded to the next multiple of `tp` and no further: fewer than `tp` rows are padding."""
        return math.ceil(self.vocab_size / tp) * tp

    def check_parallel(self, tp: int, pp: int, vpp: int = 1) -> None:
        """Raise UsageError unless the model splits over `tp` ranks, and over `pp` stages of `vpp` virtual stages."""
        for name, size in (
            ("attention heads", self.num_attention_heads),
            # Megatron would replicate kv heads where tp is larger; the weight table has no such layout.
            ("kv heads (num_key_value_heads)", self.num_query_groups),
            ("feed-forward columns (intermediate_size)", self.ffn_hidden_size),
        ):
            if size % tp:
                raise UsageError(
                    f"--tensor-model-parallel-size {tp} does not divide the model's {size} {name}; "
                    f"give a divisor of {size}"
                )
        if self.num_layers % (pp * vpp):
            raise UsageError(
                f"the model's {self.num_layers} layers do not divide into {pp} pipeline stages x {vpp} virtual stages; "
                f"--pipeline-model-parallel-size x --num-virtual-stages-per-pipeline-rank must divide {self.num_layers}"
            )

    def rope_inv_freq(self) -> Tensor:
        """Inverse frequencies of the rotary embedding, fp32 [head_dim / 2], radians per position.

        With `rope_scaling` those of llama3 (the formula of transformers' ROPE_INIT_FUNCTIONS["llama3"]): long
        wavelengths are divided by the factor, short ones kept, those between interpolated.
        """
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.int64).to(torch.float32) / self.head_dim
        inv_freq = 1.0 / (self.rope_theta**exponents)
        if self.rope_scaling is None:
            return inv_freq
        factor, low, high, original = (self.rope_scaling[key] for key in _LLAMA3_KEYS)
        wavelength = 2 * math.pi / inv_freq
        smooth = (original / wavelength - low) / (high - low)
        between = (1 - smooth) * inv_freq / factor + smooth * inv_freq
        scaled = torch.where(wavelength > original / low, inv_freq / factor, between)
        return torch.where(wavelength < original / high, inv_freq, scaled)

    def transformer_config_kwargs(self) -> dict[str, Any]:
        """The arguments of megatron.core's TransformerConfig that follow from the architecture alone."""
        return {
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "ffn_hidden_size": self.ffn_hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "num_query_groups": self.num_query_groups,
            "kv_channels": self.head_dim,
            "normalization": "RMSNorm",
            "layernorm_epsilon": self.norm_eps,
            "gated_linear_unit": True,
            "activation_func": F.silu,
            "add_bias_linear": False,
            "add_qkv_bias": self.qkv_bias,
            "qk_layernorm": self.qk_norm,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
        }


def check_layout(arch: Architecture, parallel: ParallelConfig) -> None:
    """Raise UsageError unless the model splits as the flags say, and recompute divides each stage's layers."""
    stages = parallel.pipeline_model_parallel_size * parallel.num_virtual_stages_per_pipeline_rank
    arch.check_parallel(
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.num_virtual_stages_per_pipeline_rank,
    )
    piece, layers = parallel.recompute_num_layers, arch.num_layers // stages
    if parallel.recompute_method == "uniform" and piece is not None and layers % piece:
        raise UsageError(
            f"--recompute-num-layers {piece} does not divide the {layers} layers of a stage; give a divisor of {layers}"
        )


@dataclass(frozen=True)
class _Config:
    """config.json with checked access; every error names the file."""

    path: Path
    data: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> _Config:
        path = folder / "config.json"
        if not folder.is_dir():
            raise UsageError(f"{folder} is no folder; give a local HuggingFace folder (config.json, safetensors)")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UsageError(f"{path} is missing; a HuggingFace folder has one") from error
        except (OSError, ValueError) as error:
            raise UsageError(f"{path} cannot be read as JSON: {error}".replace("\n", " ")) from error
        if not isinstance(data, dict):
            raise UsageError(f"{path} holds a {type(data).__name__} instead of a JSON object")
        return cls(path, data)

    def fail(self, text: str) -> NoReturn:
        raise UsageError(f"{self.path}: {text}")

    def family(self) -> str:
        """The model type, one of FAMILIES; refused too where `architectures` says that it has another head."""
        supported = ", ".join(FAMILIES.values())
        family = self.data.get("model_type")
        if family is None:
            self.fail("the key 'model_type' is missing")
        architectures = self.data.get("architectures")
        named = architectures[0] if isinstance(architectures, list) and architectures else family
        if not isinstance(family, str) or family not in FAMILIES or named not in (family, FAMILIES[family]):
            self.fail(f"the architecture {named} (model_type {family}) is not supported; supported: {supported}")
        return family

    def refuse_uncovered(self, family: str) -> None:
        """Refuse what would load and then compute something else."""
        if self.data.get("quantization_config") is not None:
            self.fail("quantization_config is set; give an unquantized checkpoint (fp32, bf16 or fp16)")
        if self.flag("use_sliding_window"):
            self.fail("use_sliding_window is true; sliding-window attention is not supported")
        kinds = self.data.get("layer_types") or []
        other = [kind for kind in kinds if kind != "full_attention"] if isinstance(kinds, list) else [kinds]
        if other:
            self.fail(f"layer_types has {other[0]!r}; only 'full_attention' is supported")
        # transformers' Qwen2 does not read attention_bias: it always has a bias on q, k, v and none on the output.
        if family != "qwen2" and self.flag("attention_bias"):
            self.fail(f"attention_bias is true; for {family} only models without attention bias are supported")
        if self.flag("mlp_bias"):
            self.fail("mlp_bias is true; only models without it are supported")
        activation = self.data.get("hidden_act", "silu")
        if activation != "silu":
            self.fail(f"hidden_act is {activation!r}; only 'silu' is supported")

    def rope(self) -> tuple[float, dict[str, float] | None]:
        """Theta and scaling from transformers 5's `rope_parameters` and 4's `rope_theta` and `rope_scaling`."""
        nested = [(name, self.data[name]) for name in ("rope_parameters", "rope_scaling") if self.data.get(name)]
        for name, value in nested:
            if not isinstance(value, dict) or any(isinstance(entry, dict) for entry in value.values()):
                self.fail(f"{name} is not one flat set of numbers; rotary embeddings per layer type are not supported")
        everywhere: list[tuple[str, dict[str, Any]]] = [("the top level", self.data), *nested]

        def agreed(*keys: str, among: list[tuple[str, dict[str, Any]]] = everywhere) -> Any:
            found = [(where, entry[key]) for where, entry in among for key in keys if entry.get(key) is not None]
            if any(value != found[0][1] for _, value in found):
                texts = " but ".join(f"{value!r} in {where}" for where, value in found)
                self.fail(f"{keys[0]} is {texts}; they must agree")
            return found[0][1] if found else None

        theta = agreed("rope_theta")
        theta = self.positive("rope_theta", _DEFAULT_ROPE_THETA if theta is None else theta)
        partial = agreed("partial_rotary_factor")
        if partial not in (None, 1):
            self.fail(f"partial_rotary_factor is {partial!r}; only 1 is supported")
        # transformers 5 writes rope_type, 4 wrote type before that; without a scaling there is neither.
        kind = agreed("rope_type", "type", among=nested) or "default"
        if kind == "default":
            return theta, None
        if kind != "llama3":
            self.fail(f"the rope type {kind!r} is not supported; supported: 'default', 'llama3'")
        scaling = {key: agreed(key) for key in _LLAMA3_KEYS}
        numbers = {key: self.positive(f"{key} of the llama3 rope scaling", value) for key, value in scaling.items()}
        if numbers["low_freq_factor"] >= numbers["high_freq_factor"]:
            self.fail("low_freq_factor of the llama3 rope scaling must be below high_freq_factor")
        return theta, numbers

    def integer(self, key: str, default: int | None = None, null: int | None = None) -> int:
        """A size >= 1; `default` where the key is missing, `null` (else `default`) where it is null."""
        value = self.data.get(key)
        if value is None:
            value = (null if key in self.data and null is not None else default) or self._missing(key)
        if type(value) is not int or value < 1:
            self.fail(f"{key} is {value!r}; it must be an integer from 1")
        return value

    def number(self, key: str) -> float:
        return self.positive(key, self.data[key] if self.data.get(key) is not None else self._missing(key))

    def positive(self, name: str, value: Any) -> float:
        if value is None:
            self._missing(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            self.fail(f"{name} is {value!r}; it must be a positive number")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.data.get(key)
        if value is not None and not isinstance(value, bool):
            self.fail(f"{key} is {value!r}; it must be true or false")
        return bool(value)

    def _missing(self, name: str) -> NoReturn:
        self.fail(f"{name} is missing")
