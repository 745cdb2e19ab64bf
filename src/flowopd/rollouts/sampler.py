"""The only place where a step is taken: for rollouts, for training and for evaluation."""

from collections.abc import Sequence
from copy import copy
from functools import cached_property
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from flowopd.core.dynamics import ODE, Dynamics, FlowSDE, Transition
from flowopd.core.ranges import within
from flowopd.core.schedules import Schedule, ShiftedSchedule
from flowopd.core.shown import Shown
from flowopd.core.tensors import picks, sent
from flowopd.records import Conditioning, Prompt, Rollout, StepBatch
from flowopd.rollouts.noise import RowNoise, generator
from flowopd.rollouts.steps import Steps


class VelocityField(Protocol):
    """Anything that says where a state should go."""

    def __call__(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Velocity (B, C, H, W) at x (B, C, H, W) and σ (B,)."""
        ...


class Gridded(Protocol):
    """Whoever has a grid of its own: a backbone."""

    def schedule(self) -> Schedule:
        """The noise levels that the model is meant for."""
        ...


class Sampler(Shown):
    """Grid, dynamics and noise window of a policy.

    Args:
        num_steps: T, steps of a rollout.
        schedule: the grid of noise levels; default: the backbone's own, and SD3's, shifted by 3, without a backbone.
        dynamics: how a noisy step moves; default: Flow-SDE at level 0.7.
        window: [first, last) steps that inject noise; the others follow the ODE. Default: all but the last.
        trained: [first, last) steps that may be trained on. Default: the window, and if the dynamics is the ODE all but
            the last.
        steps: which of these are trained in one rollout, drawn anew for each. Default: all of them.
        eval_steps: steps of the ODE when drawing for evaluation; default: as many as in a rollout.
        guidance_scale: s of the policy, in rollouts, training and evaluation alike.

    Raises:
        ValueError: if a number is out of range, or a window is empty or reaches outside the steps.

    >>> sampler = Sampler(num_steps=4, window=(0, 2))
    >>> sampler.sigmas()
    tensor([1.0000, 0.8577, 0.6022, 0.0089, 0.0000])
    >>> sampler.noisy()
    tensor([ True,  True, False, False])
    >>> prompts, cond = [Prompt("a cat", "animals")] * 2, Conditioning(torch.zeros(2, 1, 1), torch.zeros(2, 1))
    >>> noise = RowNoise((1, 1, 1), starts=["cat", "cat"], rows=["cat 0", "cat 1"])
    >>> towards_zero = lambda x, sigma, cond: x / sigma[:, None, None, None]  # noise - clean, where clean is 0
    >>> sampler.rollout(towards_zero, prompts, cond, noise).latents[:, :, 0, 0, 0]
    tensor([[ 0.2114,  1.1647,  1.2102,  0.0179,  0.0000],
            [ 0.2114, -0.9545, -1.2572, -0.0186,  0.0000]])
    >>> sampler.draw(towards_zero, cond, noise.start()).flatten()
    tensor([0., 0.])
    """

    def __init__(
        self,
        num_steps: int = 10,
        schedule: Schedule | None = None,
        dynamics: Dynamics | None = None,
        window: tuple[int, int] | None = None,
        trained: tuple[int, int] | None = None,
        steps: Steps | None = None,
        eval_steps: int | None = None,
        guidance_scale: float = 1.0,
    ) -> None:
        within(1, 1000, num_steps=num_steps, eval_steps=eval_steps)
        within(0.0, 100.0, guidance_scale=guidance_scale)
        self.num_steps = num_steps
        self._given = schedule
        self._model: Gridded | None = None
        self._grids: dict[tuple[int, torch.device], Tensor] = {}
        self.dynamics = dynamics or FlowSDE()
        self.window = _checked_window("window", window or (0, num_steps - 1), num_steps)
        self.trained = _checked_window("trained", trained or self.window, num_steps)
        self.steps = steps
        if steps is not None:
            steps.check(len(self.trained_steps()))
        self.eval_steps = num_steps if eval_steps is None else eval_steps
        self.guidance_scale = guidance_scale

    @cached_property
    def schedule(self) -> Schedule:
        """The grid of noise levels; a backbone's own is read when it is first asked for."""
        if self._given is not None:
            return self._given
        return ShiftedSchedule() if self._model is None else self._model.schedule()

    def on(self, model: Gridded) -> "Sampler":
        """The same sampler on the grid of a model, unless it was given one."""
        same = copy(self)
        vars(same).pop("schedule", None)
        same._model = model
        same._grids = {}
        return same

    def sigmas(self) -> Tensor:
        """The grid of a rollout, (T + 1,)."""
        return self.schedule.sigmas(self.num_steps)

    def _grid(self, num_steps: int, device: torch.device) -> Tensor:
        """The grid of so many steps where the states are, sent there once."""
        if (num_steps, device) not in self._grids:
            with torch.inference_mode(False):  # it outlives the evaluation that may have asked first
                self._grids[num_steps, device] = sent(self.schedule.sigmas(num_steps), device)
        return self._grids[num_steps, device]

    def noisy(self) -> Tensor:
        """(T,) bool, which steps inject noise."""
        steps = torch.arange(self.num_steps)
        return (steps >= self.window[0]) & (steps < self.window[1]) & self.dynamics.stochastic

    def trained_steps(self) -> range:
        """Indices of the steps that may be trained on."""
        return range(*self.trained)

    def trained_per_rollout(self) -> int:
        """How many of them are trained in one rollout."""
        return len(self.trained_steps()) if self.steps is None else self.steps.count

    def draw_steps(self, key: object) -> dict[int, float]:
        """The steps that a rollout is trained on, in order, and what the loss of each counts; the same for a key."""
        first, last = self.trained
        if self.steps is None:
            return dict.fromkeys(self.trained_steps(), 1.0)
        grid = self.sigmas()[first : last + 1]
        drawn = self.steps.draw(grid, generator(f"trained steps {key}"))
        weights = self.steps.weights(grid)
        return {first + j: float(weights[j]) for j in drawn}

    def transition(self, batch: StepBatch, velocity: Tensor) -> Transition:
        """The step that a velocity (B, C, H, W) proposes at the states of a batch."""
        return self.dynamics.step(batch.x, velocity, batch.sigma, batch.sigma_next, batch.noisy)

    def follow(self, transition: Transition, step: int, noise: RowNoise) -> Tensor:
        """The states (B, C, H, W) after step ``step``: sampled where it injects noise, else the mean."""
        return transition.sample(noise.step(step)) if bool(self.noisy()[step]) else transition.mean

    def batch_at(self, x: Tensor, step: int, cond: Conditioning, tasks: Sequence[str]) -> StepBatch:
        """States x (B, C, H, W) before step ``step``."""
        sigmas, rows = self._grid(self.num_steps, x.device), len(x)
        return StepBatch(
            x=x,
            sigma=sigmas[step].expand(rows),
            sigma_next=sigmas[step + 1].expand(rows),
            noisy=torch.full((rows,), bool(self.noisy()[step]), device=x.device),
            cond=cond,
            tasks=tasks,
            step=step,
            level=float(self._grid(self.num_steps, torch.device("cpu"))[step]),
        )

    @torch.no_grad()
    def rollout(
        self,
        field: VelocityField,
        prompts: Sequence[Prompt],
        cond: Conditioning,
        noise: RowNoise,
        branching: bool = False,
        keep_velocities: bool = True,
    ) -> Rollout:
        """Draw one trajectory per prompt.

        Args:
            field: the policy's velocity.
            prompts: B prompts.
            cond: their encodings.
            noise: their noise.
            branching: rows of one starting noise are siblings, one trajectory until the first noisy step, and computed
                once until there; the field must treat all rows alike.
            keep_velocities: for who reads them; they take as much memory as the states.
        """
        trunk = _once_per_start(field, noise) if branching else field
        x = noise.start()
        tasks = [prompt.task for prompt in prompts]
        latents = [x]
        velocities, log_probs = list[Tensor](), list[Tensor]()
        for j in range(self.num_steps):
            batch = self.batch_at(x, j, cond, tasks)
            velocity = (trunk if j < self.window[0] else field)(x, batch.sigma, cond)
            step = self.transition(batch, velocity)
            x = self.follow(step, j, noise)
            latents.append(x)
            velocities += [step.velocity] if keep_velocities else []
            log_probs.append(step.log_prob(x))
        return Rollout(
            prompts=prompts,
            cond=cond,
            sigmas=self._grid(self.num_steps, x.device),
            latents=torch.stack(latents, 1),
            velocities=torch.stack(velocities, 1) if keep_velocities else None,
            log_probs=torch.stack(log_probs, 1),
            noisy=self.noisy(),
        )

    @torch.no_grad()
    def draw(self, field: VelocityField, cond: Conditioning, x: Tensor) -> Tensor:
        """Follow the ODE from noise x (B, C, H, W) to clean latents (B, C, H, W)."""
        for sigma, sigma_next in pairwise(self._grid(self.eval_steps, x.device)):
            before, after = sigma.expand(len(x)), sigma_next.expand(len(x))
            x = ODE().step(x, field(x, before, cond), before, after).mean
        return x


def _once_per_start(field: VelocityField, noise: RowNoise) -> VelocityField:
    first, back = noise.shared_starts()

    def velocity(x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        once, again = picks(first, x.device), picks(back, x.device)
        return field(x[once], sigma[once], cond[first])[again]

    return velocity


def _checked_window(name: str, window: tuple[int, int], num_steps: int) -> tuple[int, int]:
    first, last = window
    if not (isinstance(first, int) and isinstance(last, int) and 0 <= first < last <= num_steps):
        raise ValueError(
            f"{name} [{first}, {last}) does not lie inside the {num_steps} steps; "
            f"expected 0 ≤ first < last ≤ {num_steps}"
        )
    return first, last
