"""The proof before the first step: fast gradients are compared with one example at a time, on real examples.

There are three checks, all before any budget is spent. No number made from the data leaves them but relative errors
near 1e-6.

exact      per-example gradients of a whole batch, as the engine makes them, equal a loop of plain backward passes
isolated   an example's loss and gradient are the same alone and beside others, padding up to the longest included
covered    the forward pass leaves nothing of the examples in buffers and parameters, and it reaches every hooked module

Random operations return constants meanwhile, as large as typical draws (:mod:`~dpft.gradients.preflight.stand_ins`).
A model that uses any is checked with two sets of constants. The checks run in float32 whatever the run computes in,
because rounding would hide a coupling of its own size.
"""

from dpft.gradients.findings import Preflight
from dpft.gradients.preflight.proof import preflight

__all__ = ["Preflight", "preflight"]
