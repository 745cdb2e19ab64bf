"""Several ranks on one machine, forked after the imports: seconds instead of the launchers' many."""

import os
import signal
import socket
import time
import traceback
import warnings
from collections.abc import Callable


def run_ranks(work: Callable[[], None], count: int = 2, timeout: float = 60) -> None:
    """Run ``work`` in ``count`` forked processes, as torchrun would; raise if one of them fails.

    For the CPU only: a process that has used CUDA cannot be forked. What the ranks print is captured by pytest.
    """
    port = free_port()
    ranks = {fork(work, rank, count, port): rank for rank in range(count)}
    deadline, failed = time.monotonic() + timeout, None
    while ranks and failed is None and time.monotonic() < deadline:
        process, status = os.waitpid(-1, os.WNOHANG)
        if process in ranks:
            rank = ranks.pop(process)
            failed = rank if status else None
        time.sleep(0.01)
    for process in ranks:  # of no use without the one that failed
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    if failed is not None:
        raise AssertionError(f"rank {failed} of {count} failed; its traceback is in the captured stderr")
    if ranks:
        raise TimeoutError(f"ranks {sorted(ranks.values())} of {count} did not finish within {timeout} s")


def fork(work: Callable[[], None], rank: int, count: int, port: int) -> int:
    """Start one rank; return its process id."""
    with warnings.catch_warnings():  # of forking beside threads: the ranks use none of theirs
        warnings.simplefilter("ignore", DeprecationWarning)
        process = os.fork()
    if process:
        return process
    status = 1
    try:
        os.environ |= environment(rank, count, port)
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)  # none of pytest's own endings


def environment(rank: int, count: int, port: int) -> dict[str, str]:
    """What torchrun tells its processes."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    return {name: str(value) for name, value in (place | meeting).items()}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
