"""What every test shares: one seed, no network, threads that do not fight."""

import os

# Before anything imports torch or transformers.
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests build what they need; one that downloads is a mistake
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its thread pool does not survive the fork of a test's ranks
os.environ.setdefault("MPLBACKEND", "Agg")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread per worker: two pools on the same cores are slower

import pytest
import torch


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    no_device = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(no_device)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
