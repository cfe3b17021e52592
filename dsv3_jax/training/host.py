"""The process that JAX runs in: how it is set up, and when it began."""

import os
import sys
import time
from pathlib import Path


def with_huge_pages():
    """Start again with huge pages in malloc, where that is a choice.

    XLA:CPU allocates its temporaries anew each step, and faulting them in by small pages took a
    fifth of a step's CPU time; the C library reads the setting only when a process starts.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, sys.orig_argv)


def process_began() -> float:
    """When this process began, in seconds since 1970; now, where the system doesn't tell."""
    stat = Path("/proc/self/stat")
    if not stat.exists():
        return time.time()
    ticks = int(stat.read_text().rpartition(")")[2].split()[19])  # since boot
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age
