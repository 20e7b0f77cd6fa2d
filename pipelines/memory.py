"""How the C library hands out memory while a network trains on a CPU."""

import os
import sys

# A training step takes and returns hundreds of megabytes. As it comes, glibc gives them back to the system each time
# and gets them as new pages of 4 KiB that must be cleared: 530,000 page faults in eight steps. With huge pages that it
# keeps there are 6,000, and the step is a third faster (docs/trials.md).
_TUNABLES = "hugetlb=1", "mmap_threshold=8589934592", "trim_threshold=17179869184", "top_pad=268435456"


def keep_memory() -> None:
    """Start this process anew, under its own number, with a C library that keeps its memory in huge pages.

    Does nothing where that is no Linux, or where GLIBC_TUNABLES is set already; another C library ignores it.
    """
    if sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ:
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(f"glibc.malloc.{tunable}" for tunable in _TUNABLES)
    os.execv(sys.executable, sys.orig_argv)
