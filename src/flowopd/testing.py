"""The laws of a backbone, for whoever writes one: one call proves it on a small random model in float32."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flowopd.core.dynamics import ODE
from flowopd.models import Backbone, DiffusersBackbone, LoRASpec, Question
from flowopd.models.adapters.export import ModelCard, export_adapter
from flowopd.models.adapters.files import DIFFUSERS_WEIGHTS, read_adapter
from flowopd.models.adapters.lora import adapter_parameters, add_adapter, take_adapter
from flowopd.records import Prompt, Rollout
from flowopd.rollouts import RowNoise, Sampler

TEXTS = ("a cat", "two red dogs in the rain, and a sign that says hello")
PROBE = "probe"


class Draws(Protocol):
    """A stock pipeline, or whatever else is known to draw rightly with the model."""

    def __call__(self, texts: Sequence[str], noise: Tensor, num_steps: int, scale: float) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] of B texts, from noise (B, C, H, W), by guidance s = scale."""
        ...


def check_backbone(
    backbone: Backbone,
    pipeline: Any,  # noqa: ANN401 - a pipeline of diffusers, or Draws
    texts: Sequence[str] = TEXTS,
    steps: Sequence[int] = (4, 10),
    scales: Sequence[float] = (1.0, 4.5),
    tolerance: float = 1e-5,
) -> dict[str, float]:
    """Hold a backbone to every law that training relies on.

    Args:
        backbone: in float32, loaded, without adapters; it is left with one.
        pipeline: another copy of the model: a pipeline of diffusers, or a function that draws with it.
        texts: B ≥ 2 texts, best of different lengths.
        steps: numbers of steps to draw with.
        scales: guidance s to draw with; 1 is none.
        tolerance: largest difference of pictures in [0, 1], of velocities, and of noise levels.

    Returns:
        The largest difference by law.

    Raises:
        AssertionError: naming the law that does not hold.
    """
    trial = _Trial(backbone, pipeline, texts, steps, scales)
    found = {}
    for law, allowed in LAWS.items():
        found[law.__name__] = apart = law(trial)
        limit = tolerance if allowed is None else allowed
        assert apart <= limit, f"{law.__doc__} Differs by {apart:.2g}; expected at most {limit:g}"
    return found


class _Trial:
    """A backbone, an adapter of random numbers on it, and a few rows."""

    def __init__(
        self,
        backbone: Backbone,
        pipeline: Any,  # noqa: ANN401
        texts: Sequence[str],
        steps: Sequence[int],
        scales: Sequence[float],
    ) -> None:
        self.backbone = backbone
        self.stock = pipeline if hasattr(pipeline, "load_lora_weights") else None
        self.draws: Draws = pipeline
        if self.stock is not None:
            assert isinstance(backbone, DiffusersBackbone), "a stock pipeline draws for a DiffusersBackbone"
            self.draws = partial(draw_stock, backbone, pipeline)
        self.texts, self.steps, self.scales = list(texts), list(steps), list(scales)
        self.cond = backbone.encode(self.texts)
        self.noise = RowNoise(backbone.latent_shape(), self.texts, self.texts)
        self.x = self.noise.start().to(self.cond.tokens.device)
        self.sigma = torch.linspace(0.9, 0.3, len(self.texts), device=self.x.device)
        self.base = self.velocity(None)
        add_adapter(backbone.network, PROBE, LoRASpec(rank=4, alpha=8), backbone.targets)
        self.new = self.velocity(PROBE)
        numbers = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for factor in self.factors():
                factor.copy_(0.1 * torch.randn(factor.shape, generator=numbers))

    def factors(self) -> list[nn.Parameter]:
        return adapter_parameters(self.backbone.network, PROBE)

    @torch.no_grad()
    def velocity(self, adapter: str | None) -> Tensor:
        return self.backbone.velocity(self.x, self.sigma, self.cond, adapter)

    def sampler(self, **options: Any) -> Sampler:
        return Sampler(**options).on(self.backbone)

    def pictures(self, num_steps: int, scale: float, adapter: str | None = None) -> Tensor:
        sampler = self.sampler(num_steps=num_steps, dynamics=ODE(), guidance_scale=scale)
        return self.backbone.decode(sampler.draw(self.field(scale, adapter), self.cond, self.x))

    def field(self, scale: float, adapter: str | None) -> Callable[..., Tensor]:
        return lambda x, sigma, cond: self.backbone.velocity(x, sigma, cond, adapter, scale)

    def rollout(self, sampler: Sampler) -> Rollout:
        prompts = [Prompt(text, "task") for text in self.texts]
        return sampler.rollout(self.field(sampler.guidance_scale, PROBE), prompts, self.cond, self.noise)

    def loss(self) -> Tensor:
        return self.backbone.velocity(self.x, self.sigma, self.cond, PROBE, max(self.scales)).square().mean()


def pictures_are_the_pipelines(trial: _Trial) -> float:
    """Without adapters, pictures are those of the pipeline, with guidance and without."""
    every = [(num_steps, scale) for num_steps in trial.steps for scale in trial.scales]
    return max(_apart(trial.pictures(*how), trial.draws(trial.texts, trial.x, *how)) for how in every)


def a_row_is_itself_in_a_batch(trial: _Trial) -> float:
    """A row alone has the velocity that it has beside others."""
    rows = [slice(i, i + 1) for i in range(len(trial.x))]
    with torch.no_grad():
        alone = [trial.backbone.velocity(trial.x[row], trial.sigma[row], trial.cond[row].trimmed()) for row in rows]
    return _apart(torch.cat(alone), trial.base)


def none_is_the_base(trial: _Trial) -> float:
    """A forward without adapter is the base, to the bit, whatever is loaded; a new adapter changes nothing."""
    assert not torch.equal(trial.velocity(PROBE), trial.base), "an adapter of random numbers changes nothing"
    return max(_apart(trial.velocity(None), trial.base), _apart(trial.new, trial.base))


def one_forward_answers_all(trial: _Trial) -> float:
    """Rows of an adapter and of the base, guided and not, are answered together as they are alone."""
    backbone, rows, scale = trial.backbone, range(len(trial.x)), max(trial.scales)
    questions = [
        Question(PROBE, scale, rows),
        Question(None, 1.0, [1]),
        Question(PROBE, 0.0, [0]),
        Question(None, scale, rows),
    ]
    found = backbone.velocities(trial.x, trial.sigma, trial.cond, questions)
    alone = Backbone.velocities(backbone, trial.x, trial.sigma, trial.cond, questions)
    return max(_apart(together, one) for together, one in zip(found, alone, strict=True))


def ratio_is_one(trial: _Trial) -> float:
    """A training forward of what sampled a step has its log-probability, to the bit."""
    sampler = trial.sampler(num_steps=4, guidance_scale=max(trial.scales))
    rollout, field = trial.rollout(sampler), trial.field(sampler.guidance_scale, PROBE)
    apart = 0.0
    with _training(trial.backbone.network):
        for j in sampler.trained_steps():
            batch = sampler.batch_at(rollout.latents[:, j], j, rollout.cond, trial.texts)
            step = sampler.transition(batch, field(batch.x, batch.sigma, batch.cond))
            apart = max(apart, _apart(step.log_prob(rollout.latents[:, j + 1]).detach(), rollout.log_probs[:, j]))
    return apart


def gradients_reach_every_adapter(trial: _Trial) -> float:
    """Every factor of an adapter is used (ddp waits for its gradient), and activation checkpointing changes none."""
    network: Any = trial.backbone.network
    found = []
    for switch in ("disable_gradient_checkpointing", "enable_gradient_checkpointing"):
        getattr(network, switch, lambda: None)()
        with _training(network):
            found.append(torch.autograd.grad(trial.loss(), trial.factors(), allow_unused=True))
    getattr(network, "disable_gradient_checkpointing", lambda: None)()
    named = [name for name, _ in network.named_parameters() if f".{PROBE}." in name]
    bare = [name for name, gradient in zip(named, found[0], strict=True) if gradient is None]
    assert not bare, f"no gradient reaches {bare[0]} (and {len(bare) - 1} more); leave them out of the targets"
    return max(_apart(again, first) for first, again in zip(*found, strict=True))


def an_export_is_the_adapter(trial: _Trial) -> float:
    """An exported adapter is read back whole, and the pipeline draws with it what the backbone draws."""
    adapter = take_adapter(trial.backbone.network, PROBE)
    scale = max(trial.scales)
    with tempfile.TemporaryDirectory() as folder:
        export_adapter(adapter, Path(folder), ModelCard("base", "check_backbone", guidance_scale=scale))
        assert read_adapter(folder).fingerprint() == adapter.fingerprint(), "an exported adapter is another one"
        if trial.stock is None:
            return 0.0
        trial.stock.load_lora_weights(folder, weight_name=DIFFUSERS_WEIGHTS)
    theirs = trial.draws(trial.texts, trial.x, trial.steps[0], scale)
    trial.stock.unload_lora_weights()
    return _apart(trial.pictures(trial.steps[0], scale, PROBE), theirs)


def the_grid_is_the_schedulers(trial: _Trial) -> float:
    """The noise levels are those of the pipeline's own scheduler."""
    backbone = trial.backbone
    if not isinstance(backbone, DiffusersBackbone):
        return 0.0
    return max(_apart(backbone.schedule().sigmas(n), backbone.stock_sigmas(n)) for n in (*trial.steps, 28))


LAWS: dict[Callable[[_Trial], float], float | None] = {
    the_grid_is_the_schedulers: None,
    pictures_are_the_pipelines: None,
    a_row_is_itself_in_a_batch: None,
    none_is_the_base: 0.0,
    one_forward_answers_all: None,
    ratio_is_one: 0.0,
    gradients_reach_every_adapter: None,
    an_export_is_the_adapter: None,
}
"""All of them, and the largest difference allowed; ``None``: the tolerance."""


def draw_stock(
    backbone: DiffusersBackbone,
    pipeline: Any,  # noqa: ANN401
    texts: Sequence[str],
    noise: Tensor,
    num_steps: int,
    scale: float,
) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] of B texts by a stock pipeline, from noise (B, C, H, W)."""
    pipeline.set_progress_bar_config(disable=True)
    factor = backbone.pixels_per_latent(backbone.files.config("vae"))
    words: dict[str, Any] = dict(backbone.call(scale))
    if "negative_prompt" in signature(pipeline.__call__).parameters:
        words["negative_prompt"] = [backbone.negative_prompt] * len(texts) if scale != 1 else None
    pictures: Tensor = pipeline(
        prompt=list(texts),
        height=factor * noise.shape[-2],
        width=factor * noise.shape[-1],
        num_inference_steps=num_steps,
        latents=backbone.packed(noise),
        max_sequence_length=backbone.max_sequence_length,
        output_type="pt",
        **words,
    ).images
    return pictures


def _apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max())


@contextmanager
def _training(network: nn.Module) -> Iterator[None]:
    network.train()
    with torch.enable_grad():
        yield
    network.eval()
