"""Avg@k as in arXiv 2512.19673: 32 samples on AIME, 16 on the other sets (AMC23, MATH500), T = 1."""

from megatron_bupo.config.preset import Preset

NAME = "paper"
PRESET = Preset(lambda data_set: 32 if "aime" in data_set.lower() else 16)
