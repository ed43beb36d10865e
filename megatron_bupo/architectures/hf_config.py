"""config.json with checked access: plain JSON in, plain numbers out, and every error names the file and the key."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from megatron_bupo.architectures.architecture import LLAMA3_KEYS
from megatron_bupo.errors import UsageError


@dataclass(frozen=True)
class HFConfig:
    """The keys of a config.json as written by transformers 4 or 5.

    `data` has the file's keys, and after `with_defaults` also those that the file lacks: a key that is asked for by
    `integer` or `positive` must have a default.

    Raises (every method):
        UsageError: a key is missing, has an impossible value, or means something that is not supported.
    """

    path: Path
    data: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> HFConfig:
        path = folder / "config.json"
        if not folder.is_dir():
            raise UsageError(f"{folder} is not a folder; give a local HuggingFace folder (config.json, safetensors)")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UsageError(f"{path} is missing; a HuggingFace folder has one") from error
        except (OSError, ValueError) as error:
            raise UsageError(f"{path} cannot be read as JSON: {error}".replace("\n", " ")) from error
        if not isinstance(data, dict):
            raise UsageError(f"{path} holds a {type(data).__name__} instead of a JSON object")
        return cls(path, data)

    def with_defaults(self, defaults: dict[str, Any]) -> HFConfig:
        return replace(self, data={**defaults, **self.data})

    def fail(self, text: str) -> NoReturn:
        raise UsageError(f"{self.path}: {text}")

    def integer(self, key: str, null: int | None = None) -> int:
        """A size from 1; `null` where the value is null, if that is allowed."""
        value = self.data[key] if self.data[key] is not None else null
        if type(value) is not int or value < 1:
            self.fail(f"{key} is {_spelled(value)}; it must be an integer from 1")
        return value

    def positive(self, key: str) -> float:
        return self._positive(key, self.data[key])

    def flag(self, key: str) -> bool:
        """true or false; a key that is missing or null is false."""
        value = self.data.get(key)
        if value is not None and not isinstance(value, bool):
            self.fail(f"{key} is {value!r}; it must be true or false")
        return bool(value)

    def refuse_true(self, *keys: str) -> None:
        for key in keys:
            if self.flag(key):
                self.fail(f"{key} is true; only models without it are supported")

    def refuse_windows(self) -> None:
        """Refuse layers with sliding-window attention, by the rule of transformers' Qwen2Config.

        `layer_types` decides where it is given. Without it the layers from `max_window_layers` on have windows, if
        `use_sliding_window` is true and `sliding_window` is not null.
        """
        kinds = self.data.get("layer_types")
        if kinds is not None:
            other = [kind for kind in kinds if kind != "full_attention"] if isinstance(kinds, list) else [kinds]
            if other:
                self.fail(f"layer_types has {other[0]!r}; only 'full_attention' is supported")
        elif self.flag("use_sliding_window") and self.data.get("sliding_window", 1) is not None:
            first, layers = self.data.get("max_window_layers", 0), self.integer("num_hidden_layers")
            if type(first) is not int or first < layers:
                self.fail(
                    f"use_sliding_window is true and max_window_layers {_spelled(first)} is below the {layers} layers; "
                    "sliding-window attention is not supported"
                )

    def rope(self, default_theta: float) -> tuple[float, dict[str, float] | None]:
        """Theta and scaling from transformers 5's `rope_parameters` and 4's `rope_theta` and `rope_scaling`.

        The scaling is None, or LLAMA3_KEYS with their numbers.
        """
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

        given = agreed("rope_theta")
        theta = self._positive("rope_theta", default_theta if given is None else given)
        partial = agreed("partial_rotary_factor")
        if partial not in (None, 1):
            self.fail(f"partial_rotary_factor is {partial!r}; only 1 is supported")
        # transformers 5 writes rope_type, 4 wrote type before that; without a scaling there is neither.
        kind = agreed("rope_type", "type", among=nested) or "default"
        if kind == "default":
            return theta, None
        if kind != "llama3":
            self.fail(f"the rope type {kind!r} is not supported; supported: 'default', 'llama3'")
        numbers = {key: self._positive(f"{key} of the llama3 rope scaling", agreed(key)) for key in LLAMA3_KEYS}
        if numbers["low_freq_factor"] >= numbers["high_freq_factor"]:
            self.fail("low_freq_factor of the llama3 rope scaling must be below high_freq_factor")
        return theta, numbers

    def _positive(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            self.fail(f"{name} is {_spelled(value)}; it must be a positive number")
        return float(value)


def _spelled(value: Any) -> str:
    return "null" if value is None else repr(value)
