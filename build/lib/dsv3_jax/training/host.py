"""How the process is set up before JAX starts."""

import os
import sys


def with_huge_pages():
    """Start again with huge pages in malloc, where that is a choice.

    XLA:CPU allocates its temporaries anew each step, and faulting them in by small pages took a
    fifth of a step's CPU time; the C library reads the setting only when a process starts.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, sys.orig_argv)
