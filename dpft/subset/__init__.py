"""Which parameters train."""

from dpft.subset.layers import replace_batchnorm
from dpft.subset.parts import All, Bias, Head, LastBlocks, Layers, Lora, Norms, Sparse, Tuner
from dpft.subset.saved import check_room, check_savable, check_saved, outputs
from dpft.subset.subset import Subset
from dpft.subset.weights import load_weights, save_weights

__all__ = [
    "All",
    "Bias",
    "Head",
    "LastBlocks",
    "Layers",
    "Lora",
    "Norms",
    "Sparse",
    "Subset",
    "Tuner",
    "check_room",
    "check_savable",
    "check_saved",
    "load_weights",
    "outputs",
    "replace_batchnorm",
    "save_weights",
]
