"""What a run leaves behind: its typed record and where its files are. Needs no torch."""

from dpft.runs.folder import RunFolder
from dpft.runs.record import RunRecord

__all__ = ["RunFolder", "RunRecord"]
