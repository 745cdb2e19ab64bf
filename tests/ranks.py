"""Several ranks on one machine, forked after the imports: seconds instead of the launchers' many."""

import os
import signal
import socket
import time
import traceback
import warnings
from collections.abc import Callable

import torch


def run_ranks(
    work: Callable[[], None], count: int = 2, timeout: float = 60, launched: Callable[..., dict[str, str]] | None = None
) -> None:
    """Run ``work`` in ``count`` forked processes, told what a launcher tells its own; raise if one of them fails.

    For the CPU only: a process that has used CUDA cannot be forked. What the ranks print is captured by pytest.
    """
    port = free_port()
    ranks = {fork(work, (launched or one_node)(rank, count, port)): rank for rank in range(count)}
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


def fork(work: Callable[[], None], told: dict[str, str]) -> int:
    """Start one rank; return its process id."""
    with warnings.catch_warnings():  # of forking beside threads: the ranks use none of theirs
        warnings.simplefilter("ignore", DeprecationWarning)
        process = os.fork()
    if process:
        return process
    status = 1
    try:
        os.environ |= told
        torch.set_num_threads(1)  # alone: torch renews its thread pool after a fork, and two threads at once break it
        work()
        time.sleep(0.3)  # one that leaves at once resets the connections on which others still read
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)  # none of pytest's own endings


def one_node(rank: int, count: int, port: int) -> dict[str, str]:
    """What torchrun tells its processes on one node."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    return texts(place | meeting(port) | {"TORCHELASTIC_RUN_ID": "test"})


def torchrun_node(rank: int, count: int, port: int) -> dict[str, str]:
    """What torchrun tells the only process of a node."""
    place = {"RANK": rank, "LOCAL_RANK": 0, "GROUP_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": 1}
    return texts(place | meeting(port) | {"TORCHELASTIC_RUN_ID": "test"})


def slurm_node(rank: int, count: int, port: int) -> dict[str, str]:
    """What srun tells the only process of a node."""
    place = {"PROCID": rank, "LOCALID": 0, "NODEID": rank, "NTASKS": count, "NTASKS_PER_NODE": 1, "NNODES": count}
    job = {"JOB_ID": 12345, "JOB_NAME": "train", "NODELIST": "127.0.0.1"}
    return texts({f"SLURM_{name}": value for name, value in (place | job).items()} | meeting(port))


def meeting(port: int) -> dict[str, object]:
    """Where the ranks meet."""
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def texts(values: dict[str, object]) -> dict[str, str]:
    """An environment's values are text."""
    return {name: str(value) for name, value in values.items()}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
