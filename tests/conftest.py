"""What every test shares: one seed, no network, threads that do not fight."""

import os
import sys

# Before anything imports torch or transformers.
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests build what they need; one that downloads is a mistake
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its thread pool does not survive the fork of a test's ranks
os.environ.setdefault("MPLBACKEND", "Agg")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread per worker: two pools on the same cores are slower

import pytest
import torch

torch.set_num_threads(1)  # tiny tensors are faster so, and a fork keeps no thread pool


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


@pytest.fixture
def flowopd(monkeypatch):
    """Run the command line in this process."""
    from flowopd.cli.main import main

    def run(*words: object) -> None:
        monkeypatch.setattr(sys, "argv", ["flowopd", *map(str, words)])
        main()

    return run


@pytest.fixture
def built(flowopd, monkeypatch):
    """Build a run on the CPU, and give what would run."""
    from flowopd.cli.run import FlowCLI

    def build(*words: object) -> FlowCLI:
        made = []
        with monkeypatch.context() as context:
            context.setattr(FlowCLI, "_run_subcommand", lambda cli, _: made.append(cli))
            flowopd(*words, "--trainer.accelerator=cpu")
        return made[0]

    return build


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory):
    """A folder with a random Stable Diffusion 3 pipeline: two CLIPs and a T5."""
    return saved_pipeline(tmp_path_factory, "with_t5", t5=True)


@pytest.fixture(scope="session")
def tiny_pipeline_without_t5(tmp_path_factory):
    """The same, two CLIPs only."""
    return saved_pipeline(tmp_path_factory, "without_t5", t5=False)


def saved_pipeline(tmp_path_factory, name, **kind):
    import tiny  # imports diffusers, which the tests of core can do without

    folder = str(tmp_path_factory.mktemp("pipelines") / name)
    tiny.pipeline(**kind).save_pretrained(folder)
    return folder
