"""Which parameters train."""

from dpft.subset.parts import All, Bias, Head, LastBlocks, Layers, Lora, Norms
from dpft.subset.subset import Subset, save_weights

__all__ = ["All", "Bias", "Head", "LastBlocks", "Layers", "Lora", "Norms", "Subset", "save_weights"]
