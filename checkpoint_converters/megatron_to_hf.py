"""Turn a distributed checkpoint, converted or trained, into a HuggingFace folder.

    python checkpoint_converters/megatron_to_hf.py --checkpoint CKPT --output DIR
    python checkpoint_converters/megatron_to_hf.py --checkpoint CKPT --output DIR --policy layer:6

What was converted goes back exactly: names, dtypes, shards, index. What was trained is written in the dtype of its
training. `--policy` writes an internal policy as a model of its own.
"""

from __future__ import annotations

import sys
import time

from megatron_bupo.config.converters import MegatronToHFConfig
from megatron_bupo.conversion.program import report, report_tokenizer, run_converter
from megatron_bupo.policy_spec import PolicySpec


def run(config: MegatronToHFConfig) -> None:
    import torch

    from megatron_bupo.conversion.convert import megatron_to_hf
    from megatron_bupo.conversion.policy_export import export_policy
    from megatron_bupo.conversion.workers import launched

    dtype = getattr(torch, config.dtype) if config.dtype else None
    source, output, force = config.checkpoint, config.output, config.force
    with launched() as ranks:
        started = time.monotonic()
        if config.policy is None:
            num_bytes = megatron_to_hf(source, output, ranks, dtype, force)
        else:
            num_bytes = export_policy(source, output, PolicySpec.parse(config.policy), ranks, dtype, force)
        report(ranks.rank, output, num_bytes, started)
        report_tokenizer(ranks.rank, output)
        if config.policy is not None and ranks.rank == 0:
            print(f"{output} has a modeling file of its own: load it with trust_remote_code=True")


if __name__ == "__main__":
    sys.exit(run_converter("megatron_to_hf.py", MegatronToHFConfig, run))
