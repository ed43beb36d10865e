"""Compare a HuggingFace folder with a distributed checkpoint: every tensor bit for bit, and the logits of both models.

    python checkpoint_converters/verify.py --hf-model DIR --checkpoint CKPT

Ends with 0 where all agree and with 1 where something differs.
"""

from __future__ import annotations

import sys

from megatron_bupo.config.converters import VerifyConfig
from megatron_bupo.conversion.program import run_converter


def run(config: VerifyConfig) -> int:
    from megatron_bupo.conversion import verify

    return verify.run(config.hf_model, config.checkpoint, config.layout.parallel, not config.weights_only)


if __name__ == "__main__":
    sys.exit(run_converter("verify.py", VerifyConfig, run))
