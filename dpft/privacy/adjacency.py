"""Which data sets must be indistinguishable.

It is apart from the accountants because SciPy and dp-accounting, which they import, take a second.
"""

from typing import Literal, get_args

Adjacency = Literal["add-or-remove-one", "replace-one", "zero-out"]
ADJACENCIES: tuple[str, ...] = get_args(Adjacency)
