"""Pass@k as in arXiv 2512.19673: 300 samples for k up to 256, T = 1."""

from megatron_bupo.config.preset import Preset

NAME = "paper-pass-at-k"
PRESET = Preset(lambda data_set: 300)
