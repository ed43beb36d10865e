"""Which distribution of the model is meant: the full policy or one of its internal policies.

With H_l the raw residual stream after layer l (from 1), A_l and F_l the outputs of its attention and feed-forward
modules, W the unembedding and T the temperature (arXiv 2512.19673, section 3):

    full        softmax(norm(H_L) W^T / T)
    layer:l     softmax(H_l W^T / T)            no final norm
    attn:l      softmax(A_l W^T / T)
    ffn:l       softmax(F_l W^T / T)
    ...@norm    the same with the final norm in front of the unembedding (the paper's ablation)
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_bupo.errors import UsageError

INTERNAL_MODULES = ("layer", "attn", "ffn")
_PATTERN = re.compile(r"(?P<module>layer|attn|ffn):(?P<layer>[1-9]\d*)(?P<norm>@norm)?")


@dataclass(frozen=True, order=True)
class PolicySpec:
    """One policy of a model.

    >>> PolicySpec.parse("layer:6@norm")
    PolicySpec(module='layer', layer=6, norm=True)
    >>> str(PolicySpec.parse("attn:3"))
    'attn:3'
    """

    module: str = "full"
    layer: int | None = None
    norm: bool = True

    @classmethod
    def parse(cls, text: str) -> PolicySpec:
        """Read ``full``, ``layer:L``, ``attn:L`` or ``ffn:L``, the last three also with ``@norm``.

        Raises:
            UsageError: anything else; ``*`` and ``+`` are kept free for weighted sums and refused by name.
        """
        if text == "full":
            return cls()
        if "*" in text or "+" in text:
            raise UsageError(f"policy '{text}': weighted sums of policies are not there yet; give a single policy")
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise UsageError(
                f"policy '{text}' is none of: full, layer:L, attn:L, ffn:L (L from 1), layer:L@norm, attn:L@norm, "
                "ffn:L@norm"
            )
        return cls(match["module"], int(match["layer"]), match["norm"] is not None)

    def __str__(self) -> str:
        if self.module == "full":
            return "full"
        return f"{self.module}:{self.layer}{'@norm' if self.norm else ''}"

    @property
    def is_full(self) -> bool:
        return self.module == "full"

    def check(self, num_layers: int) -> None:
        """Raise UsageError unless the layer is one of 1..num_layers."""
        if self.layer is not None and self.layer > num_layers:
            raise UsageError(f"policy '{self}': the model has layers 1 to {num_layers}")
