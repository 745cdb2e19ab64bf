"""A process that ends with the one that started it, on Linux: ``python -m flowopd.cli.study.tied PARENT PROGRAM …``.

Nothing heavy is imported here: the process becomes the program.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
"""By ``linux/prctl.h``; it outlives ``execv``."""


def main() -> None:
    """Ask the kernel for SIGTERM when the parent is gone, however it went; then become the program."""
    parent, *words = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != int(parent):  # it was gone before
            raise SystemExit("the study has ended")
    os.execv(words[0], words)


if __name__ == "__main__":
    main()
