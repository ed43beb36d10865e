"""Turn a HuggingFace folder into a distributed checkpoint of megatron-core.

    python checkpoint_converters/hf_to_megatron.py --hf-model DIR --output CKPT
    torchrun --nproc-per-node 4 checkpoint_converters/hf_to_megatron.py --hf-model DIR --output CKPT \
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2

Every layout loads the checkpoint, whatever the one it was written in.
"""

from __future__ import annotations

import sys
import time

from megatron_bupo.config.converters import HFToMegatronConfig
from megatron_bupo.conversion.program import report, run_converter


def run(config: HFToMegatronConfig) -> None:
    from megatron_bupo.conversion.convert import hf_to_megatron
    from megatron_bupo.conversion.workers import launched

    with launched() as ranks:
        started = time.monotonic()
        num_bytes = hf_to_megatron(config.hf_model, config.output, config.layout.parallel, ranks, config.force)
        report(ranks.rank, config.output, num_bytes, started)


if __name__ == "__main__":
    sys.exit(run_converter("hf_to_megatron.py", HFToMegatronConfig, run))
