"""How many threads a transformer of Stable Diffusion 3 wants on the CPU, beside nothing and beside other work.

    python tests/benchmarks/threads.py            # idle
    python tests/benchmarks/threads.py busy       # as many processes as there are cores compute meanwhile

One line per network: milliseconds per training step (forward and backward), the least of several, by threads.
"""

import multiprocessing
import os
import statistics
import sys
import time

import torch
from diffusers import SD3Transformer2DModel

NETWORKS = {  # layers, width, latent side: a token is 2 × 2
    "tiles, 3 layers x 128, 16 tokens": (3, 128, 8),
    "4 layers x 256, 64 tokens": (4, 256, 16),
    "6 layers x 384, 64 tokens": (6, 384, 16),
    "8 layers x 512, 256 tokens": (8, 512, 32),
}
ROWS, TEXT, REPEATS = 24, 16, 8


def network(layers: int, width: int, side: int) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=side,
        pos_embed_max_size=side // 2,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        num_attention_heads=width // 32,
        attention_head_dim=32,
        joint_attention_dim=width,
        caption_projection_dim=width,
        pooled_projection_dim=width,
    )


def milliseconds(layers: int, width: int, side: int, repeats: int) -> list[float]:
    """Of training steps, after one that warms up."""
    torch.manual_seed(0)
    model = network(layers, width, side)
    x, text, pooled = torch.randn(ROWS, 4, side, side), torch.randn(ROWS, TEXT, width), torch.randn(ROWS, width)
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        model(x, text, pooled, torch.full((ROWS,), 500.0), return_dict=False)[0].square().mean().backward()
        times.append(1000 * (time.perf_counter() - began))
    return times[1:]


def compute() -> None:
    torch.set_num_threads(1)
    matrix = torch.randn(256, 256)
    while True:
        matrix = (matrix @ matrix).tanh()


def main() -> None:
    cores = os.cpu_count() or 1
    others = [multiprocessing.Process(target=compute, daemon=True) for _ in range(cores if "busy" in sys.argv else 0)]
    for other in others:
        other.start()
    for name, shape in NETWORKS.items():
        parameters = sum(parameter.numel() for parameter in network(*shape).parameters())
        line = []
        for threads in sorted({1, 2, cores // 2, cores} - {0}):
            torch.set_num_threads(threads)
            times = milliseconds(*shape, REPEATS)
            line.append(f"{threads} threads {min(times):.1f} (median {statistics.median(times):.1f})")
        print(f"{name}, {parameters / 1e6:.1f} M parameters: {', '.join(line)}", flush=True)


if __name__ == "__main__":
    main()
