"""What a visited step is trained on.

An objective sees the student's ``Transition`` p_θ(x_σ' | x_σ), which alone carries gradient, and the ``Labels`` of the
state, which it detaches. It returns a scalar loss and a dict of detached scalars.

Log-probabilities and KLs are means over the D latent dimensions, as in Flow-GRPO; ratios are their exponentials, close
to 1. A policy gradient of the KL needs the total log-ratio as its advantage, so the surrogates below multiply by D:

    E[ D · A · ∇ρ ] = E[ (D·A) · ∇(log p / D) ],      ∇ of nats per latent dimension.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from flowopd.core.dynamics import Transition
from flowopd.core.ramps import Course
from flowopd.core.ranges import above, at_least, finite, within
from flowopd.core.shown import Shown
from flowopd.core.tensors import row_mean, same_shape
from flowopd.core.weights import CleanPicture, ExactKL, Released, Uniform, Weighting

Metrics = dict[str, Tensor]

BRANCHES = frozenset({"target_conditional", "target_unconditional"})
"""Labels of an objective that compares branches; whoever reads them wants ``Transition.branches`` too."""


@dataclass(frozen=True)
class Labels:
    """What is known about B visited states, all without gradient; ``None`` is not known.

    In a ``Rollout`` every field has a step axis after the batch, (B, T, ...).

    Args:
        x_next: (B, C, H, W) the state that was sampled from here.
        log_prob_old: (B,) its log-probability under the policy that sampled it, nats per latent dimension.
        advantage: (B,) of the finished image.
        target: (B, C, H, W) velocity to learn from: the teacher's, or noise - clean.
        target_conditional, target_unconditional: (B, C, H, W) the two branches of the teacher's guidance.
        old: (B, C, H, W) velocity of the policy that sampled the picture.
        anchor: (B, C, H, W) velocity of the anchor (MAR) or of the reference policy.
        state_kl: (B,) KL to the teacher at this state under the sampling policy, nats per latent dimension.
        kl_to_go: (B,) sum of the KLs of all later steps.
        weight: (B,) share of a row in the loss, 1 on average.

    >>> Labels(advantage=torch.tensor([0.5])).present()
    {'advantage': tensor([0.5000])}
    """

    x_next: Tensor | None = None
    log_prob_old: Tensor | None = None
    advantage: Tensor | None = None
    target: Tensor | None = None
    target_conditional: Tensor | None = None
    target_unconditional: Tensor | None = None
    old: Tensor | None = None
    anchor: Tensor | None = None
    state_kl: Tensor | None = None
    kl_to_go: Tensor | None = None
    weight: Tensor | None = None

    def present(self) -> dict[str, Tensor]:
        """The labels that are known."""
        facts = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in facts.items() if value is not None}

    def __getitem__(self, rows: Tensor | slice) -> "Labels":
        """What is known about some of the states, by their numbers."""
        return Labels(**{name: value[rows] for name, value in self.present().items()})


@runtime_checkable
class Objective(Protocol):
    """A loss on visited steps.

    An implementation names the labels that it reads in ``needs``, so that a missing teacher is noticed at the start.

    >>> class Distance:
    ...     needs = frozenset({"target"})
    ...     def loss(self, student: Transition, labels: Labels) -> tuple[Tensor, Metrics]:
    ...         loss = squared_error(student, required(labels, "target")).mean()
    ...         return loss, {"distill/loss": loss.detach()}
    >>> isinstance(Distance(), Objective)
    True
    """

    def loss(self, student: Transition, labels: Labels) -> tuple[Tensor, Metrics]:
        """Return the scalar loss, and detached scalars named ``stage/quantity``."""
        ...


class TransitionKL(Shown):
    """Pathwise distillation: the distance of the student's step to the teacher's, states fixed.

        L = mean_b  w(σ_b) · mean_{CHW} (v_θ - v_teacher)²

    With ``ExactKL`` weights, L is the mean KL(p_θ ‖ p_teacher) of the visited steps, in nats per latent dimension, and
    its gradient is the pathwise term of the gradient of the trajectory KL. Gradient: through v_θ only.

    Args:
        weighting: w, the worth of a velocity error at each noise level.

    References:
        DiffusionOPD (arXiv 2605.15055); the first term of the reverse KL's gradient.

    >>> from flowopd.core import FlowSDE
    >>> x, sigma = torch.zeros(1, 4, 2, 2), torch.tensor([0.8])
    >>> student = FlowSDE().step(x, velocity=x, sigma=sigma, sigma_next=sigma / 2)
    >>> TransitionKL().loss(student, Labels(target=x + 1))[0], student.kl(student.shifted_to(x + 1))
    (tensor(0.1582), tensor([0.1582]))
    """

    needs = frozenset({"target"})

    def __init__(self, weighting: Weighting | None = None) -> None:
        self.weighting = weighting or ExactKL()

    def loss(self, student: Transition, labels: Labels) -> tuple[Tensor, Metrics]:
        """Return the weighted distance to ``labels.target``."""
        distance = squared_error(student, required(labels, "target"))
        loss = (self.weighting.weight(student) * distance).mean()
        return loss, {"distill/loss": loss.detach(), "distill/velocity_mse": distance.detach().mean()}


class FlowMatching(Shown):
    """Rectified-flow regression,  L = mean ‖v_θ - (noise - clean)‖², mean over B, C, H, W.

    Rows with a ``labels.weight`` count by it.

    References:
        Flow Matching for Generative Modeling (Lipman et al., 2023).

    >>> from flowopd.core import ODE, interpolate, velocity_from
    >>> clean, noise, sigma = torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1, 2), torch.tensor([0.5])
    >>> x = interpolate(clean, noise, sigma)
    >>> student = ODE().step(x, velocity=x, sigma=sigma, sigma_next=0 * sigma)
    >>> FlowMatching().loss(student, Labels(target=velocity_from(clean, noise)))[0]  # (0.5 - -1)²
    tensor(2.2500)
    """

    needs = frozenset({"target"})

    def loss(self, student: Transition, labels: Labels) -> tuple[Tensor, Metrics]:
        """Return the mean squared distance to ``labels.target`` = noise - clean."""
        error = squared_error(student, required(labels, "target"))
        loss = error.mean() if labels.weight is None else (labels.weight.detach() * error).mean()
        return loss, {"flow_matching/loss": loss.detach()}


class ClippedSurrogate(Shown):
    """PPO's clipped surrogate on the steps of a rollout (GRPO).

        ρ = exp(log p_θ(x'|x) - log p_old(x'|x)),   L = -mean min(ρ·A, clip(ρ, 1 - ε, 1 + ε)·A)

    The log-probabilities are means over latent dimensions, so ρ stays close to 1 and ε is small. Gradient: through
    log p_θ only.

    Args:
        clip_range: ε.

    References:
        PPO (arXiv 1707.06347), Eq. 7; Flow-GRPO (arXiv 2505.05470).

    >>> from flowopd.core import FlowSDE
    >>> x, sigma = torch.zeros(1, 4, 2, 2), torch.tensor([0.8])
    >>> student = FlowSDE().step(x, velocity=x, sigma=sigma, sigma_next=sigma / 2)
    >>> labels = Labels(x_next=x + 0.1, log_prob_old=student.log_prob(x + 0.1), advantage=torch.tensor([2.0]))
    >>> loss, metrics = ClippedSurrogate().loss(student, labels)
    >>> loss, metrics["policy/ratio"]
    (tensor(-2.), tensor(1.))
    """

    needs = frozenset({"x_next", "log_prob_old", "advantage"})

    def __init__(self, clip_range: float = 1e-4) -> None:
        _check_limits(clip_range=clip_range)
        self.clip_range = clip_range

    def loss(self, student: Transition, labels: Labels) -> tuple[Tensor, Metrics]:
        """Return the surrogate of ``labels.advantage``."""
        return surrogate(student, labels, required(labels, "advantage"), self.clip_range, "policy")


class LogRatioSurrogate(Shown):
    """On-policy distillation as a policy gradient: the sampled log-ratio is the advantage.

        A = D · (log p_teacher(x'|x) - log p_old(x'|x)),   L = clipped surrogate of A

    E[A · ∇ρ] = -∇KL(p_θ ‖ p_teacher) on policy: the same expected gradient as ``TransitionKL`` with exact weights, with
    more variance. Gradient: through log p_θ only.

    Args:
        clip_range: ε of the surrogate; infinity for none.

    >>> from flowopd.core import FlowSDE
    >>> x, sigma = torch.zeros(1, 4, 2, 2), torch.tensor([0.8])
    >>> student = FlowSDE().step(x, velocity=x, sigma=sigma, sigma_next=sigma / 2)
    >>> labels = Labels(x_next=x + 0.1, log_prob_old=student.log_prob(x + 0.1), target=x - 0.2)
    >>> LogRatioSurrogate().loss(student, labels)[0]  # a teacher that makes what was sampled likelier: A > 0
    tensor(-0.1020)
    """

    needs = frozenset({"x_next", "log_prob_old", "target"})

    def __init__(self, clip_range: float = 1e-4) -> None:
        _check_limits(clip_range=clip_range)
        self.clip_range = clip_range

    def loss(self, student: Transition, labels: Labels) -> tuple[Tensor, Metrics]:
        """Return the surrogate of the log-ratio to ``labels.target``."""
        teacher = student.detach().shifted_to(required(labels, "target").detach())
        x_next, log_prob_old = required(labels, "x_next"), required(labels, "log_prob_old")
        advantage = dimensions(student) * (teacher.log_prob(x_next) - log_prob_old)
        return surrogate(student, labels, advantage, self.clip_range, "distill")


class ReturnToGo(Shown):
    """How a step changes which states come later: the other half of the trajectory KL's gradient.

        A_j = -D · Σ_{k>j} K_k(x_k),   L = surrogate of A  [+ pathwise KL]

    With ``pathwise`` the expected gradient is that of J = E[Σ_j K_j], exactly. The sum comes detached from the rollout.

    Args:
        pathwise: add ``TransitionKL`` with exact weights.
        clip_range: ε of the surrogate; infinity for none.

    >>> from flowopd.core import FlowSDE
    >>> x, sigma = torch.zeros(1, 4, 2, 2), torch.tensor([0.8])
    >>> student = FlowSDE().step(x, velocity=x, sigma=sigma, sigma_next=sigma / 2)
    >>> labels = Labels(x_next=x + 0.1, log_prob_old=student.log_prob(x + 0.1), kl_to_go=torch.tensor([0.25]))
    >>> ReturnToGo(pathwise=False).loss(student, labels)[0]  # D · 0.25
    tensor(4.)
    """

    needs = frozenset({"x_next", "log_prob_old", "target", "kl_to_go"})

    def __init__(self, pathwise: bool = True, clip_range: float = math.inf) -> None:
        self.pathwise = pathwise
        _check_limits(clip_range=clip_range)
        self.clip_range = clip_range
        self.weighting = ExactKL()

    def loss(self, student: Transition, labels: Labels) -> tuple[Tensor, Metrics]:
        """Return the surrogate of ``-labels.kl_to_go``."""
        advantage = -dimensions(student) * required(labels, "kl_to_go")
        loss, metrics = surrogate(student, labels, advantage, self.clip_range, "return_to_go")
        if not self.pathwise:
            return loss, metrics
        pathwise, more = TransitionKL(self.weighting).loss(student, labels)
        return loss + pathwise, metrics | more


class StateRewardSurrogate(Shown):
    """Flow-OPD's Eq. 10-11 to the letter, for ablations: the step's own KL, detached, is its reward.

        r_j = -K_j(x_j),   L = clipped surrogate of r_j with the ratio of the same step

    K_j depends on the state alone, so it is a baseline: E[r_j · ∇log p(x_{j+1}|x_j)] = 0. It does not learn.

    Args:
        clip_range: ε of the surrogate.

    References:
        Flow-OPD (arXiv 2605.08063), Eq. 10-11.

    >>> from flowopd.core import FlowSDE
    >>> x, sigma = torch.zeros(1, 4, 2, 2), torch.tensor([0.8])
    >>> student = FlowSDE().step(x, velocity=x, sigma=sigma, sigma_next=sigma / 2)
    >>> labels = Labels(x_next=x + 0.1, log_prob_old=student.log_prob(x + 0.1), state_kl=torch.tensor([0.25]))
    >>> StateRewardSurrogate().loss(student, labels)[0]
    tensor(0.2500)
    """

    needs = frozenset({"x_next", "log_prob_old", "state_kl"})

    def __init__(self, clip_range: float = 1e-4) -> None:
        _check_limits(clip_range=clip_range)
        self.clip_range = clip_range

    def loss(self, student: Transition, labels: Labels) -> tuple[Tensor, Metrics]:
        """Return the surrogate of ``-labels.state_kl``."""
        return surrogate(student, labels, -required(labels, "state_kl"), self.clip_range, "state_reward")


class ReleasedKL(Shown):
    """What the public Flow-OPD code computes (``kl_only``).

        K = mean (Δmean)² / 2g²,   A_i = clamp(-K_i, ±5) with its gradient,
        L = -mean_{i,j} min(ρ_j·A_i, clip(ρ_j, 1 - ε, 1 + ε)·A_i)

    A of shape (B, 1) meets ρ of shape (B,), so L is the mean of an outer product. On policy its gradient is the
    gradient of the mean K, plus noise whose mean is zero. Gradient: through K and through ρ.

    Args:
        clip_range: ε.
        advantage_clip: largest K.

    References:
        The released code of Flow-OPD (arXiv 2605.08063).

    >>> from flowopd.core import FlowSDE
    >>> x, sigma = torch.zeros(1, 4, 2, 2), torch.tensor([0.8])
    >>> student = FlowSDE().step(x, velocity=x, sigma=sigma, sigma_next=sigma / 2)
    >>> labels = Labels(x_next=x + 0.1, log_prob_old=student.log_prob(x + 0.1), target=x + 1)
    >>> ReleasedKL().loss(student, labels)[0], TransitionKL(Released()).loss(student, labels)[0]
    (tensor(0.0633), tensor(0.0633))
    """

    needs = frozenset({"x_next", "log_prob_old", "target"})

    def __init__(self, clip_range: float = 1e-4, advantage_clip: float = 5.0) -> None:
        _check_limits(clip_range=clip_range)
        self.clip_range = clip_range
        _check_limits(advantage_clip=advantage_clip)
        self.advantage_clip = advantage_clip
        self.weighting = Released()

    def loss(self, student: Transition, labels: Labels) -> tuple[Tensor, Metrics]:
        """Return the outer-product surrogate."""
        distance = squared_error(student, required(labels, "target"))
        kl = (self.weighting.weight(student) * distance).clamp(max=self.advantage_clip)
        ratio, _ = importance_ratio(student, labels)
        gain = torch.minimum(outer(-kl, ratio), outer(-kl, clipped(ratio, self.clip_range)))
        loss = -gain.mean()
        return loss, {"distill/loss": loss.detach(), "distill/velocity_mse": distance.detach().mean()}


class Anchored(Shown):
    """Any objective plus a pull to the anchor:  L = L_objective + λ · mean w · mean (v_θ - v_anchor)².

    The anchor may be asked about some of the trained steps alone, each with probability p, drawn anew in every
    iteration; there the pull counts λ / p, elsewhere it is left out, so that the expected gradient is that of all
    steps. With the frozen aesthetic teacher as anchor this is MAR, Manifold Anchor Regularization; with the base model
    it is GRPO's KL to the reference. Gradient: through v_θ only.

    Args:
        objective: the objective to anchor.
        strength: λ, or its course along training, such as a ``Ramp``; the paper's 0.02 goes with ``ExactKL`` weights,
            the released code's 0.04 with ``Released`` ones.
        weighting: w; ``ExactKL``, as in the paper, makes the pull a KL in nats per latent dimension.
        asked: p, the share of the trained steps that the anchor is asked about.

    References:
        Flow-OPD (arXiv 2605.08063), MAR.

    >>> from flowopd.core import ODE, Uniform
    >>> x, sigma = torch.ones(1, 1, 1, 1), torch.tensor([0.5])
    >>> student = ODE().step(x, velocity=3 * x, sigma=sigma, sigma_next=sigma / 2)
    >>> anchored = Anchored(FlowMatching(), strength=0.1, weighting=Uniform())
    >>> anchored.loss(student, Labels(target=x, anchor=0 * x))  # (3 - 1)² + 0.1 · 3²
    (tensor(4.9000), {'flow_matching/loss': tensor(4.), 'anchor/loss': tensor(9.)})
    """

    def __init__(
        self,
        objective: Objective,
        strength: float | Course = 0.02,
        weighting: Weighting | None = None,
        asked: float = 1.0,
    ) -> None:
        if not isinstance(strength, Course):
            at_least(0.0, strength=strength)
        above(0.0, asked=asked)
        within(0.0, 1.0, asked=asked)
        self.objective = objective
        self.needs = labels_of(objective) | {"anchor"}
        self.strength = strength
        self.weighting = weighting or ExactKL()
        self.asked = asked
        self.iteration = 0  # a training sets it
        anchor_share(self)

    def loss(self, student: Transition, labels: Labels) -> tuple[Tensor, Metrics]:
        """Return the objective's loss plus the pull to ``labels.anchor``, which a step that was not drawn lacks."""
        loss, metrics = self.objective.loss(student, labels)
        strength = self.strength
        if isinstance(strength, Course):
            strength = strength.at(self.iteration)
            metrics = metrics | {"anchor/strength": torch.full_like(student.sigma[0], strength)}
        if labels.anchor is None and self.asked < 1:
            return loss, metrics
        distance = squared_error(student, required(labels, "anchor"))
        pull = (self.weighting.weight(student) * distance).mean()
        return loss + strength / self.asked * pull, metrics | {"anchor/loss": pull.detach()}


class SelfNormalisedDistance(Shown):
    """A squared distance to the teacher that counts as an absolute one: every row is divided by its own size.

        e = √w(σ) · (v_θ - v_teacher),   L = mean_b  mean e² / sg(mean |e|),    mean over C, H, W of a row

    sg passes no gradient, so a row's gradient has the direction of the weighted squared error's, and a length that does
    not shrink as the error does. With ``CleanPicture`` weights e is the error of the clean picture, with ``ExactKL``
    that of the step's mean in units of √2 std, with ``Uniform`` that of the velocity. Gradient: through v_θ only.

    Args:
        weighting: w, the space in which the error is measured.
        floor: smallest divisor.

    References:
        DiffusionNFT (arXiv 2509.16117) divides the error of the clean picture so.

    >>> from flowopd.core import ODE
    >>> x, sigma = torch.zeros(1, 1, 1, 2), torch.tensor([0.5])
    >>> student = ODE().step(x, torch.tensor([[[[3.0, -1.0]]]]), sigma, sigma / 2)
    >>> SelfNormalisedDistance().loss(student, Labels(target=x))[0]  # e = 1.5, -0.5:  1.25 / 1
    tensor(1.2500)
    """

    needs = frozenset({"target"})

    def __init__(self, weighting: Weighting | None = None, floor: float = 1e-5) -> None:
        self.weighting = weighting or CleanPicture()
        above(0.0, floor=floor)
        self.floor = floor

    def loss(self, student: Transition, labels: Labels) -> tuple[Tensor, Metrics]:
        """Return the normalised distance to ``labels.target``."""
        target = required(labels, "target")
        loss = self_normalised(student, target, self.weighting, self.floor).mean()
        distance = squared_error(student, target).detach().mean()
        return loss, {"distill/loss": loss.detach(), "distill/velocity_mse": distance}


class NegativeAware(Shown):
    """Reward learning on the forward process: good pictures pull the student away from the old policy, bad ones push.

        r  = clip(1/2 + A / (2·A_max), 0, 1)
        v⁺ = v_old + β·(v_θ - v_old),       v⁻ = v_old - β·(v_θ - v_old)
        L  = A_max / β · mean_b  r·d(v⁺) + (1 - r)·d(v⁻),       d(v) = mean e² / sg(mean |e|),   e = √w(σ)·(v - target)

    The states are noised pictures of the old policy, and target = noise - clean; with ``CleanPicture`` weights e is the
    error of the clean picture. Without the divisors, and with e_old = √w·(v_old - target) and Δ = √w·(v_θ - v_old),

        L = 2·A·mean e_old·Δ + β·A_max·mean Δ² + a constant:

    a signed regression towards the picture, and a pull to the old policy of strength β·A_max. At v_θ = v_old the
    divisors change this gradient by the row's mean |e_old| alone; equal siblings have r = 1/2, and teach nothing.
    Gradient: through v_θ only.

    Args:
        beta: β.
        advantage_max: A_max, the advantage from which a picture is wholly good.
        weighting: w, the space in which errors are measured.
        normalise: divide every row's error by its own size.
        floor: smallest divisor.

    References:
        DiffusionNFT (arXiv 2509.16117).

    >>> from flowopd.core import ODE
    >>> x, sigma = torch.zeros(1, 1, 1, 2), torch.tensor([1.0])
    >>> student = ODE().step(x, x + 1, sigma, sigma / 2)
    >>> labels = Labels(target=x + 3, old=x + 2, advantage=torch.tensor([5.0]))  # wholly good: 5 · d(1), and d(1) = 2
    >>> NegativeAware(beta=1.0).loss(student, labels)[0]
    tensor(10.)
    """

    needs = frozenset({"target", "old", "advantage"})

    def __init__(
        self,
        beta: float = 1.0,
        advantage_max: float = 5.0,
        weighting: Weighting | None = None,
        normalise: bool = True,
        floor: float = 1e-5,
    ) -> None:
        above(0.0, beta=beta, advantage_max=advantage_max, floor=floor)
        self.beta = beta
        self.advantage_max = advantage_max
        self.weighting = weighting or CleanPicture()
        self.normalise = normalise
        self.floor = floor

    def goodness(self, advantage: Tensor) -> Tensor:
        """r (B,) in [0, 1] of advantages (B,)."""
        return (0.5 + advantage.detach() / (2 * self.advantage_max)).clamp(0, 1)

    def loss(self, student: Transition, labels: Labels) -> tuple[Tensor, Metrics]:
        """Return the loss of ``labels.advantage`` around ``labels.old``."""
        old = required(labels, "old").detach()
        good = self.goodness(required(labels, "advantage"))
        change = self.beta * (student.velocity - old)
        towards, away = self._distance(student, labels, old + change), self._distance(student, labels, old - change)
        same_shape(advantage=good, distance=towards)
        loss = self.advantage_max / self.beta * (good * towards + (1 - good) * away).mean()
        return loss, {
            "nft/loss": loss.detach(),
            "nft/goodness": good.mean(),
            "nft/moved": squared_error(student, old).detach().mean(),
        }

    def _distance(self, student: Transition, labels: Labels, velocity: Tensor) -> Tensor:
        proposed, target = student.shifted_to(velocity), required(labels, "target")
        if self.normalise:
            return self_normalised(proposed, target, self.weighting, self.floor)
        return self.weighting.weight(proposed) * squared_error(proposed, target)


class BranchDistance(Shown):
    """The distance of both branches of a guided student to those of its teacher (PDM).

        e₊ = v_θ^c - v_T^c,   e₋ = v_θ^u - v_T^u,   L = mean w(σ) · (mean e₊² + λ · mean (e₊ - e₋)²)

    The second term compares what guidance multiplies, v^c - v^u. Velocities that are guided by s agree wherever
    e₊ = (s - 1)/s · e₋, however large; this distance is zero at the teacher's branches only. So the teacher's own scale
    has no say: a student without error is, drawn at any scale, the teacher at that scale. Gradient: through v_θ^c and
    v_θ^u only.

    Args:
        strength: λ; with 0 the unconditional branch is free.
        weighting: w.

    References:
        PDM (arXiv 2607.24731).

    >>> from dataclasses import replace
    >>> from flowopd.core import ODE
    >>> x, sigma = torch.ones(1, 1, 1, 1), torch.tensor([0.5])
    >>> student = replace(ODE().step(x, 3 * x, sigma, sigma / 2), branches=(2 * x, x))
    >>> labels = Labels(target_conditional=x, target_unconditional=3 * x)
    >>> BranchDistance(strength=0.5).loss(student, labels)[0]  # (2 - 1)² + 0.5 · (1 - -2)²
    tensor(5.5000)
    """

    needs = BRANCHES

    def __init__(self, strength: float = 1.0, weighting: Weighting | None = None) -> None:
        at_least(0.0, strength=strength)
        self.strength = strength
        self.weighting = weighting or Uniform()

    def loss(self, student: Transition, labels: Labels) -> tuple[Tensor, Metrics]:
        """Return the weighted distance to both branches of the labels."""
        if student.branches is None:
            raise ValueError("the objective compares branches, but the step has none; set Transition.branches")
        conditional, unconditional = (
            velocity - required(labels, name).detach()
            for velocity, name in zip(student.branches, ("target_conditional", "target_unconditional"), strict=True)
        )
        distance, contrast = row_mean(conditional**2), row_mean((conditional - unconditional) ** 2)
        loss = (self.weighting.weight(student) * (distance + self.strength * contrast)).mean()
        return loss, {
            "distill/loss": loss.detach(),
            "distill/velocity_mse": distance.detach().mean(),
            "distill/contrast_mse": contrast.detach().mean(),
        }


class WeightedSum(Shown):
    """Several objectives on the same states,  L = Σ_k w_k · L_k;  its gradient is Σ_k w_k · ∇L_k.

    Such as reward and distillation together: a clipped surrogate of the advantage, and the distance to the teacher.
    Metrics keep their names; where two objectives share one, that of the second is of the stage ``<stage>_2``.

    Args:
        objectives: what is summed.
        weights: w_k; default: 1 each.

    Raises:
        ValueError: if there are not as many weights as objectives.

    References:
        The ``mixed`` mode of Flow-OPD's released code (arXiv 2605.08063): task advantage and KL to the teacher.

    >>> from flowopd.core import ODE, Uniform
    >>> x, sigma = torch.ones(1, 1, 1, 1), torch.tensor([0.5])
    >>> student, labels = ODE().step(x, 3 * x, sigma, sigma / 2), Labels(target=x)
    >>> loss, metrics = WeightedSum([TransitionKL(Uniform()), FlowMatching()], [1.0, 0.5]).loss(student, labels)
    >>> loss, list(metrics)
    (tensor(6.), ['distill/loss', 'distill/velocity_mse', 'flow_matching/loss'])
    """

    def __init__(self, objectives: list[Objective], weights: list[float] | None = None) -> None:
        self.objectives = objectives
        self.weights = weights or [1.0] * len(objectives)
        finite(**{f"weights[{k}]": weight for k, weight in enumerate(self.weights)})
        self.needs = frozenset[str]().union(*map(labels_of, objectives))
        anchor_share(self)
        if len(self.weights) != len(objectives):
            raise ValueError(
                f"there are {len(self.weights)} weights for {len(objectives)} objectives; expected one each"
            )

    def loss(self, student: Transition, labels: Labels) -> tuple[Tensor, Metrics]:
        """Return the sum, and the metrics of every objective."""
        total = torch.zeros_like(student.sigma[0])
        metrics: Metrics = {}
        for weight, objective in zip(self.weights, self.objectives, strict=True):
            loss, found = objective.loss(student, labels)
            total = total + weight * loss
            metrics |= {_free(name, metrics): value for name, value in found.items()}
        return total, metrics


def _free(name: str, taken: Metrics) -> str:
    """The name, or the first of ``<stage>_2/quantity``, ``<stage>_3/quantity``, ... that nobody has."""
    stage, quantity = name.split("/", 1)
    names = itertools.chain([name], (f"{stage}_{number}/{quantity}" for number in itertools.count(2)))
    return next(free for free in names if free not in taken)


def labels_of(objective: Objective) -> frozenset[str]:
    """Names of the labels that the objective reads."""
    return frozenset(getattr(objective, "needs", frozenset()))


def anchors_in(objective: Objective) -> Iterator[Anchored]:
    """Every ``Anchored`` that an objective is, or is made of."""
    return (part for part in parts_in(objective) if isinstance(part, Anchored))


def weightings_in(objective: Objective) -> Iterator[Weighting]:
    """Every weighting by which an objective, or what it is made of, tells steps apart."""
    for part in parts_in(objective):
        found = (value for value in getattr(part, "__dict__", {}).values() if isinstance(value, Weighting))
        yield from (value for value in found if callable(value.weight))  # the weight of a layer is none


def parts_in(objective: Objective) -> Iterator[Objective]:
    """An objective and all that it is made of."""
    yield objective
    inner = getattr(objective, "objective", None)
    for part in [*getattr(objective, "objectives", ()), *([] if inner is None else [inner])]:
        yield from parts_in(part)


def anchor_share(objective: Objective) -> float:
    """The share of the trained steps that an objective asks the anchor about; 1 without an anchor.

    Raises:
        ValueError: if parts of it ask differently: one answer is for all.
    """
    shares = sorted({anchored.asked for anchored in anchors_in(objective)})
    if len(shares) > 1:
        raise ValueError(f"the anchor is asked about shares {shares} of the steps; expected one share, for all alike")
    return shares[0] if shares else 1.0


def squared_error(student: Transition, velocity: Tensor) -> Tensor:
    """mean_{CHW} (v_θ - v)², (B,); ``velocity`` is detached."""
    same_shape(student=student.velocity, target=velocity)
    return row_mean((student.velocity - velocity.detach()) ** 2)


def self_normalised(student: Transition, target: Tensor, weighting: Weighting, floor: float) -> Tensor:
    """mean e² / sg(mean |e|) of every row, (B,), where e = √w(σ) · (v_θ - target)."""
    weight = weighting.weight(student)
    size = weight.sqrt() * row_mean((student.velocity - target).detach().abs())
    return weight * squared_error(student, target) / size.clamp(min=floor)


def importance_ratio(student: Transition, labels: Labels) -> tuple[Tensor, Tensor]:
    """ρ = exp(log p_θ - log p_old) and its logarithm, (B,); exactly 1 in the first update after a rollout."""
    log_prob = student.log_prob(required(labels, "x_next"))
    log_prob_old = required(labels, "log_prob_old").detach()
    same_shape(log_prob=log_prob, log_prob_old=log_prob_old)
    log_ratio = log_prob - log_prob_old
    return torch.exp(log_ratio), log_ratio


def surrogate(
    student: Transition, labels: Labels, advantage: Tensor, clip_range: float, stage: str
) -> tuple[Tensor, Metrics]:
    """PPO's clipped surrogate of a detached advantage (B,), and what to watch of its ratio."""
    ratio, log_ratio = importance_ratio(student, labels)
    advantage = advantage.detach()  # a weight, not a path to the policy
    same_shape(ratio=ratio, advantage=advantage)
    loss = -torch.minimum(ratio * advantage, clipped(ratio, clip_range) * advantage).mean()
    outside = ((ratio.detach() - 1).abs() > clip_range).float().mean()
    return loss, {
        f"{stage}/loss": loss.detach(),
        f"{stage}/ratio": ratio.detach().mean(),
        f"{stage}/clip_fraction": outside,
        f"{stage}/log_ratio": log_ratio.detach().mean(),
    }


def clipped(ratio: Tensor, clip_range: float) -> Tensor:
    """clip(ρ, 1 - ε, 1 + ε)."""
    return ratio.clamp(1 - clip_range, 1 + clip_range)


def _check_limits(**limits: float) -> None:
    at_least(0.0, **{name: limit for name, limit in limits.items() if limit != math.inf})  # infinity is none


def outer(rows: Tensor, columns: Tensor) -> Tensor:
    """(B, B) products of two (B,) vectors."""
    return rows[:, None] * columns[None, :]


def dimensions(student: Transition) -> int:
    """D, the number of latent dimensions of one row."""
    return student.mean[0].numel()


def required(labels: Labels, name: str) -> Tensor:
    """The label of this name, or a sentence that says what is missing.

    Raises:
        ValueError: if nobody labelled the rollout with it.
    """
    label: Tensor | None = getattr(labels, name)
    if label is None:
        raise ValueError(f"the objective needs labels.{name}, which nothing provided; {_PROVIDERS[name]}")
    return label


_PROVIDERS: dict[str, str] = {
    "x_next": "collect a rollout with noisy steps",
    "log_prob_old": "collect a rollout with noisy steps",
    "advantage": "add a RewardCallback",
    "target": "add a TeacherCallback",
    "target_conditional": "add a TeacherCallback",
    "target_unconditional": "add a TeacherCallback",
    "old": "train an NFTTeacher",
    "anchor": "add an AnchorCallback",
    "state_kl": "add a TeacherCallback and collect whole rollouts (fused: false)",
    "kl_to_go": "add a TeacherCallback and collect whole rollouts (fused: false)",
}
