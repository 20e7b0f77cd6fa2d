"""What the system tells of a process (Linux)."""

import os
from pathlib import Path
from typing import NamedTuple


class ProcessState(NamedTuple):
    """The process that started it, and the seconds of processor time that it has used, as user and as system."""

    parent: int
    seconds: float


def state_of(process: int) -> ProcessState:
    """What /proc tells of a process.

    Raises:
        OSError: there is no such process, or no /proc.
    """
    # Its name comes first, in parentheses, and may hold spaces and parentheses of its own.
    fields = Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()
    return ProcessState(int(fields[1]), (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"))
