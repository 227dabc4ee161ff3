"""Which parameters train."""

from dpft.subset.layers import replace_batchnorm
from dpft.subset.parts import All, Bias, Head, LastBlocks, Layers, Lora, Norms, Sparse, Tuner
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
    "load_weights",
    "replace_batchnorm",
    "save_weights",
]
