"""The laws of the objectives: the expectation of each one's gradient, exactly, where it can be known.

A student whose velocity is linear in x walks three Flow-SDE steps from standard normal noise, in D = 1 or 2 latent
dimensions. States, KLs and scores are then polynomials of the noise, which Gauss-Hermite quadrature integrates exactly.
"""

import itertools
import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from flowopd.core import (
    ODE,
    Anchored,
    BranchDistance,
    CleanPicture,
    ClippedSurrogate,
    ExactKL,
    FlowMatching,
    FlowSDE,
    Labels,
    LogRatioSurrogate,
    NegativeAware,
    Released,
    ReleasedKL,
    ReturnToGo,
    SelfNormalisedDistance,
    StateRewardSurrogate,
    Transition,
    TransitionKL,
    Uniform,
    WeightedSum,
    clean_from_velocity,
    guided,
)
from flowopd.core.objectives import importance_ratio, labels_of

SIGMAS = torch.tensor([0.95, 0.8, 0.5, 0.3], dtype=torch.float64)
STEPS = range(3)
STUDENT = torch.tensor([0.3, -0.5, 0.2], dtype=torch.float64)  # offset, slope, and slope in the other dimension
TEACHER = torch.tensor([-0.2, 0.4, -0.1], dtype=torch.float64)
DIMENSIONS = pytest.mark.parametrize("dimensions", [1, 2])


def velocity(theta: Tensor, x: Tensor) -> Tensor:
    """v_d = θ₀ + θ₁·x_d + θ₂·x_other; one θ for all rows (3,), or one per row (B, 3)."""
    offset, slope, other = theta.unsqueeze(-1).unbind(-2)
    return offset + slope * x + other * x.flip(1)


def step(theta: Tensor, x: Tensor, j: int) -> Transition:
    rows = (len(x),)
    return FlowSDE(0.7).step(x, velocity(theta, x), SIGMAS[j].expand(rows), SIGMAS[j + 1].expand(rows))


def quadrature(variables: int, nodes: int = 3) -> tuple[Tensor, Tensor]:
    """Points (N, variables) and weights (N,) for standard normals, exact up to degree 2·nodes - 1 in each."""
    x, w = np.polynomial.hermite_e.hermegauss(nodes)
    points = torch.tensor(list(itertools.product(x, repeat=variables)), dtype=torch.float64)
    weights = torch.tensor(list(itertools.product(w / w.sum(), repeat=variables)), dtype=torch.float64)
    return points, weights.prod(1)


@dataclass(frozen=True)
class Walk:
    """Every trajectory of the quadrature: noise of the start and of three steps."""

    dimensions: int

    @cached_property
    def noise(self) -> tuple[Tensor, Tensor]:
        points, weights = quadrature(4 * self.dimensions)
        return points.reshape(-1, 4, self.dimensions), weights

    def states(self, theta: Tensor) -> list[Tensor]:
        """x_0 ... x_3, with gradient by reparameterisation."""
        noise, _ = self.noise
        states = [noise[:, 0]]
        for j in STEPS:
            states.append(step(theta, states[-1], j).sample(noise[:, j + 1]))
        return states

    def kls(self, theta: Tensor, states: list[Tensor]) -> Tensor:
        """K_j(x_j) in nats per latent dimension, (N, 3)."""
        return torch.stack([step(theta, states[j], j).kl(step(TEACHER, states[j], j)) for j in STEPS], 1)

    def mean(self, values: Tensor) -> Tensor:
        """E of values (N, ...)."""
        return torch.einsum("n,n...->...", self.noise[1], values)

    def expected_gradient(self, objective) -> Tensor:
        """E of the objective's gradient on policy, summed over steps.

        Every row gets a copy of θ, so that the gradient of the batch's mean loss falls apart into its rows'.
        """
        states = self.states(STUDENT)
        kl = self.kls(STUDENT, states)
        to_go = kl.flip(1).cumsum(1).flip(1) - kl
        total = torch.zeros(3, dtype=torch.float64)
        for j in STEPS:
            theta = STUDENT.expand(len(kl), 3).clone().requires_grad_()
            student = step(theta, states[j], j)
            labels = labelled(student, states[j], states[j + 1], state_kl=kl[:, j], kl_to_go=to_go[:, j])
            (gradient,) = torch.autograd.grad(objective.loss(student, labels)[0], theta)
            total += self.mean(gradient * len(kl))
        return total

    def pathwise(self, weights=(1, 1, 1)) -> Tensor:
        """∇ E[Σ_j w_j·K_j(x_j)] with the states held fixed."""
        theta = STUDENT.clone().requires_grad_()
        states = [x.detach() for x in self.states(theta)]
        kl = self.kls(theta, states) @ torch.tensor(weights, dtype=torch.float64)
        return torch.autograd.grad(self.mean(kl), theta)[0]

    def whole(self) -> Tensor:
        """∇J, J = E[Σ_j K_j(x_j)], through the states too."""
        theta = STUDENT.clone().requires_grad_()
        kl = self.kls(theta, self.states(theta)).sum(1)
        return torch.autograd.grad(self.mean(kl), theta)[0]


def labelled(student: Transition, x: Tensor, x_next: Tensor, **facts: Tensor) -> Labels:
    log_prob_old = student.detach().log_prob(x_next)
    return Labels(x_next=x_next, log_prob_old=log_prob_old, target=velocity(TEACHER, x), **facts)


def joint(theta: Tensor, dimensions: int) -> MultivariateNormal:
    """The Gaussian of a whole trajectory, (x_0, ..., x_3) of one student, by matrices."""
    eye = torch.eye(dimensions, dtype=torch.float64)
    means, spreads = [torch.zeros(dimensions, dtype=torch.float64)], [[eye]]  # x_j = mean_j + Σ_i spread_ji · noise_i
    for j in STEPS:
        state, gain, std = FlowSDE(0.7).coefficients(SIGMAS[j], SIGMAS[j + 1])
        factor = state * eye + gain * (theta[1] * eye + theta[2] * eye.flip(0))
        means.append(factor @ means[-1] + gain * theta[0])
        spreads.append([*(factor @ spread for spread in spreads[-1]), std * eye])
    zero = torch.zeros_like(eye)
    rows = [torch.cat([*row, *[zero] * (4 - len(row))], 1) for row in spreads]
    return MultivariateNormal(torch.cat(means), scale_tril=torch.cat(rows))


@DIMENSIONS
def test_the_quadrature_knows_the_kl_of_whole_trajectories(dimensions):
    walk = Walk(dimensions)
    theta = STUDENT.clone().requires_grad_()
    exact = kl_divergence(joint(theta, dimensions), joint(TEACHER, dimensions)) / dimensions
    torch.testing.assert_close(walk.mean(walk.kls(STUDENT, walk.states(STUDENT)).sum(1)), exact)
    torch.testing.assert_close(walk.whole(), torch.autograd.grad(exact, theta)[0])


@DIMENSIONS
def test_transition_kl_is_the_pathwise_term(dimensions):
    walk = Walk(dimensions)
    torch.testing.assert_close(walk.expected_gradient(TransitionKL()), walk.pathwise())
    assert not torch.allclose(walk.pathwise(), walk.whole(), rtol=0.01)  # so that the next law is not this one


@DIMENSIONS
def test_pathwise_and_return_to_go_are_the_gradient_of_the_trajectory_kl(dimensions):
    walk = Walk(dimensions)
    to_go = walk.expected_gradient(ReturnToGo(pathwise=False))
    torch.testing.assert_close(walk.expected_gradient(TransitionKL()) + to_go, walk.whole())
    torch.testing.assert_close(walk.expected_gradient(ReturnToGo()), walk.whole())


@DIMENSIONS
def test_the_sampled_log_ratio_is_the_pathwise_term_in_expectation(dimensions):
    walk = Walk(dimensions)
    torch.testing.assert_close(walk.expected_gradient(LogRatioSurrogate()), walk.pathwise())


@DIMENSIONS
def test_the_state_reward_of_the_paper_does_not_learn(dimensions):
    walk = Walk(dimensions)
    nothing = torch.zeros(3, dtype=torch.float64)
    torch.testing.assert_close(walk.expected_gradient(StateRewardSurrogate()), nothing, atol=1e-12, rtol=0)


@DIMENSIONS
def test_the_released_loss_is_the_mean_released_kl_in_expectation(dimensions):
    """Two independent rows meet in its outer product, so the quadrature runs over pairs of them."""
    theta, last = STUDENT.clone().requires_grad_(), STEPS[-1]
    expected, (points, weights) = torch.zeros(3, dtype=torch.float64), quadrature(2 * dimensions, nodes=2)
    x, noise = (part.reshape(-1, dimensions) for part in points.chunk(2, 1))
    for a, b in itertools.product(range(len(x)), repeat=2):
        student = step(theta, x[[a, b]], last)
        x_next = student.detach().sample(noise[[a, b]])
        loss, _ = ReleasedKL(advantage_clip=math.inf).loss(student, labelled(student, x[[a, b]], x_next))
        expected += weights[a] * weights[b] * torch.autograd.grad(loss, theta)[0]
    student, target = step(theta, x, last), velocity(TEACHER, x)
    released = Released().weight(student) * ((student.velocity - target) ** 2).mean(1)
    torch.testing.assert_close(expected, torch.autograd.grad(weights @ released, theta)[0])


def test_the_released_weight_is_the_exact_kl_times_the_step_size():
    walk, sizes = Walk(1), (SIGMAS[:-1] - SIGMAS[1:]).tolist()
    torch.testing.assert_close(walk.expected_gradient(TransitionKL(Released())), walk.pathwise(sizes))


def test_flow_matching_is_the_uniform_distance():
    walk = Walk(2)
    torch.testing.assert_close(walk.expected_gradient(FlowMatching()), walk.expected_gradient(TransitionKL(Uniform())))


# ----------------------------------------------------------------------------------------------- on one batch of states

ROWS = 4
EVERY = [
    TransitionKL(),
    FlowMatching(),
    ClippedSurrogate(),
    LogRatioSurrogate(),
    ReturnToGo(),
    StateRewardSurrogate(),
    ReleasedKL(),
    Anchored(ClippedSurrogate()),
    SelfNormalisedDistance(),
    NegativeAware(),
    WeightedSum([ClippedSurrogate(), Anchored(ReturnToGo()), TransitionKL()], [0.3, 2.0, 1.0]),
]
every_objective = pytest.mark.parametrize("objective", EVERY, ids=lambda objective: type(objective).__name__)


def visited(theta: Tensor = STUDENT, **facts: Tensor | None) -> tuple[Transition, Labels]:
    """Four states before step 1, fully labelled."""
    x, noise = torch.randn(2, ROWS, 2, dtype=torch.float64).unbind()
    student = step(theta, x, 1)
    known = {name: torch.rand(ROWS, dtype=torch.float64) for name in ("advantage", "state_kl", "kl_to_go")}
    known |= {"anchor": velocity(-TEACHER, x), "old": velocity(-STUDENT, x)}
    return student, labelled(student, x, student.detach().sample(noise), **(known | facts))


def gradient(objective, student: Transition, labels: Labels, theta: Tensor) -> Tensor:
    return torch.autograd.grad(objective.loss(student, labels)[0], theta, retain_graph=True)[0]


@pytest.fixture
def theta():
    return STUDENT.clone().requires_grad_()


def test_on_policy_the_clipped_surrogate_is_the_policy_gradient(theta):
    student, labels = visited(theta)
    gain = (labels.advantage * student.log_prob(labels.x_next)).mean()
    (expected,) = torch.autograd.grad(-gain, theta, retain_graph=True)
    torch.testing.assert_close(gradient(ClippedSurrogate(), student, labels, theta), expected)


@pytest.mark.parametrize(
    ("moved", "advantage", "learns"), [(+1, +1, False), (+1, -1, True), (-1, +1, True), (-1, -1, False)]
)
def test_clipping_stops_only_what_would_go_further_outside(theta, moved, advantage, learns):
    """moved: which side of the range the ratio is on; the gradient survives where it leads back inside."""
    student, labels = visited(theta, advantage=torch.full((ROWS,), float(advantage), dtype=torch.float64))
    old = student.detach().log_prob(labels.x_next) - moved * 2e-3
    labels = Labels(x_next=labels.x_next, log_prob_old=old, advantage=labels.advantage)
    found = gradient(ClippedSurrogate(clip_range=1e-3), student, labels, theta)
    assert bool(found.any()) == learns


def test_an_advantage_of_shape_b_1_is_refused(theta):
    student, labels = visited(theta, advantage=torch.ones(ROWS, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"'ratio': \(4,\), 'advantage': \(4, 1\)"):
        ClippedSurrogate().loss(student, labels)


def test_the_ratio_is_exactly_one_on_policy(theta):
    student, labels = visited(theta)
    ratio, log_ratio = importance_ratio(student, labels)
    assert ratio.tolist() == [1] * ROWS
    assert log_ratio.tolist() == [0] * ROWS


def test_the_released_loss_is_an_outer_product(theta):
    """Every row's K meets every row's ratio, clipped: L = mean_ij -min(ρ_j·A_i, clip(ρ_j)·A_i), A = -min(K, 5)."""
    student, labels = visited(theta)
    labels = replace(labels, log_prob_old=labels.log_prob_old + torch.tensor([0.1, -0.1, 1e-5, 0.3]))
    ratio, _ = importance_ratio(student, labels)
    g = FlowSDE(0.7).diffusion(student.sigma, student.sigma_next)
    kl = (student.gain**2 / (2 * g**2) * ((student.velocity - labels.target) ** 2).mean(1)).clamp(max=0.05)
    gains = [min(-k * r, -k * r.clamp(1 - 1e-4, 1 + 1e-4)) for k, r in itertools.product(kl, ratio)]
    loss, _ = ReleasedKL(clip_range=1e-4, advantage_clip=0.05).loss(student, labels)
    torch.testing.assert_close(loss, -torch.stack(gains).mean())
    assert 0 < (kl == 0.05).sum() < ROWS


@pytest.mark.parametrize("weighting", [ExactKL(), Uniform()], ids=["exact", "uniform"])
def test_an_anchor_adds_its_weighted_distance(theta, weighting):
    student, labels = visited(theta)
    alone, _ = TransitionKL().loss(student, labels)
    anchored, metrics = Anchored(TransitionKL(), strength=0.3, weighting=weighting).loss(student, labels)
    pull = (weighting.weight(student) * ((student.velocity - labels.anchor) ** 2).mean(1)).mean()
    torch.testing.assert_close(anchored, alone + 0.3 * pull)
    assert metrics["anchor/loss"] == pull
    if isinstance(weighting, ExactKL):
        torch.testing.assert_close(pull, student.kl(student.shifted_to(labels.anchor)).mean())


@pytest.mark.parametrize("objective", [TransitionKL(), FlowMatching(), ReleasedKL(), Anchored(TransitionKL())])
def test_a_teacher_equal_to_the_student_asks_for_nothing(theta, objective):
    student, labels = visited(theta)
    same = Labels(
        labels.x_next, labels.log_prob_old, target=student.velocity.detach(), anchor=student.velocity.detach()
    )
    loss, _ = objective.loss(student, same)
    assert loss == 0
    assert torch.autograd.grad(loss, theta)[0].tolist() == [0, 0, 0]


@every_objective
def test_labels_take_no_gradient(theta, objective):
    student, labels = visited(theta)
    facts = {name: fact.detach().requires_grad_() for name, fact in labels.present().items()}
    del facts["x_next"]  # a sampled state is data
    objective.loss(student, Labels(labels.x_next, **facts))[0].backward()
    assert theta.grad is not None
    assert [name for name, fact in facts.items() if fact.grad is not None] == []


@every_objective
def test_metrics_are_detached_scalars_named_by_stage(theta, objective):
    loss, metrics = objective.loss(*visited(theta))
    assert loss.shape == ()
    assert all(value.shape == () and not value.requires_grad for value in metrics.values())
    assert all(name.count("/") == 1 for name in metrics)


PROVIDERS = {
    "x_next": "noisy steps",
    "log_prob_old": "noisy steps",
    "advantage": "RewardCallback",
    "target": "TeacherCallback",
    "old": "NFTTeacher",
    "anchor": "AnchorCallback",
    "state_kl": "TeacherCallback and collect whole rollouts",
    "kl_to_go": "TeacherCallback and collect whole rollouts",
}


@every_objective
def test_a_missing_label_is_named_with_what_provides_it(theta, objective):
    student, labels = visited(theta)
    assert labels_of(objective)
    for name in labels_of(objective):
        known = {other: value for other, value in labels.present().items() if other != name}
        with pytest.raises(ValueError, match=f"needs labels.{name}, which nothing provided; .*{PROVIDERS[name]}"):
            objective.loss(student, Labels(**known))


@every_objective
def test_an_objective_reads_only_the_labels_that_it_names(theta, objective):
    student, labels = visited(theta)
    named = {name: value for name, value in labels.present().items() if name in labels_of(objective)}
    objective.loss(student, Labels(**named))


def test_a_deterministic_step_can_be_distilled_by_distance_only(theta):
    x = torch.randn(ROWS, 2, dtype=torch.float64)
    student = ODE().step(x, velocity(theta, x), SIGMAS[1].expand(ROWS), SIGMAS[2].expand(ROWS))
    labels = Labels(target=velocity(TEACHER, x))
    assert TransitionKL(Uniform()).loss(student, labels)[0] > 0
    with pytest.raises(ValueError, match="deterministic step"):
        TransitionKL().loss(student, labels)


# ------------------------------------------------------------------------------------------------------ self-normalised


def test_the_self_normalised_clean_distance_is_that_of_the_predicted_pictures(theta):
    """mean (x̂ - x̂_T)² / mean |x̂ - x̂_T| of each row, x̂ = x - σ·v."""
    student, labels = visited(theta)
    x = torch.randn_like(student.velocity)
    error = clean_from_velocity(x, student.velocity, student.sigma) - clean_from_velocity(
        x, labels.target, student.sigma
    )
    loss, _ = SelfNormalisedDistance(CleanPicture()).loss(student, labels)
    torch.testing.assert_close(loss, ((error**2).mean(1) / error.abs().mean(1)).mean())


@pytest.mark.parametrize("weighting", [CleanPicture(), Uniform(), ExactKL()], ids=["clean", "uniform", "exact"])
def test_self_normalising_divides_every_row_s_gradient_by_its_mean_absolute_error(theta, weighting):
    student, labels = visited(theta)
    error = weighting.weight(student).sqrt()[:, None] * (student.velocity - labels.target)
    rows = [torch.autograd.grad(row, theta, retain_graph=True)[0] for row in (error**2).mean(1)]
    expected = sum(row / size for row, size in zip(rows, error.detach().abs().mean(1), strict=True)) / ROWS
    torch.testing.assert_close(gradient(SelfNormalisedDistance(weighting), student, labels, theta), expected)


def test_self_normalised_a_smaller_error_asks_for_as_much(theta):
    student, labels = visited(theta)
    near = replace(labels, target=(student.velocity + 1e-3 * (labels.target - student.velocity)).detach())
    pulls = [gradient(SelfNormalisedDistance(), student, facts, theta) for facts in (labels, near)]
    plain = [gradient(TransitionKL(), student, facts, theta) for facts in (labels, near)]
    torch.testing.assert_close(pulls[1], pulls[0])
    torch.testing.assert_close(plain[1], 1e-3 * plain[0])


# ------------------------------------------------------------------------------------------------------------- branches


def branching(e_plus: Tensor, e_minus: Tensor, scale: float = 4.5) -> tuple[Transition, Labels]:
    """Four states of a student guided by ``scale``, whose branches err by e₊ and e₋, (4, 2)."""
    x, target, other = torch.randn(3, ROWS, 2, dtype=torch.float64).unbind()
    branches = (target + e_plus).requires_grad_(), (other + e_minus).requires_grad_()
    levels = (level.expand(ROWS) for level in SIGMAS[1:3])
    student = replace(FlowSDE(0.7).step(x, guided(*branches, scale), *levels), branches=branches)
    return student, Labels(target=guided(target, other, scale), target_conditional=target, target_unconditional=other)


def errors() -> tuple[Tensor, Tensor]:
    return torch.randn(2, ROWS, 2, dtype=torch.float64).unbind()


@pytest.mark.parametrize("weighting", [Uniform(), ExactKL(), CleanPicture()], ids=["uniform", "exact", "clean"])
def test_the_branch_distance_and_its_gradient_are_those_of_both_errors(weighting):
    e_plus, e_minus = errors()
    student, labels = branching(e_plus, e_minus)
    loss, metrics = BranchDistance(0.3, weighting).loss(student, labels)
    weight, contrast = weighting.weight(student)[:, None], e_plus - e_minus
    torch.testing.assert_close(loss, (weight * (e_plus**2 + 0.3 * contrast**2)).mean())
    torch.testing.assert_close(metrics["distill/contrast_mse"], (contrast**2).mean())
    found = torch.autograd.grad(loss, student.branches)
    torch.testing.assert_close(found[0], 2 * weight * (e_plus + 0.3 * contrast) / e_plus.numel())
    torch.testing.assert_close(found[1], -2 * weight * 0.3 * contrast / e_plus.numel())


def test_with_strength_zero_the_branch_distance_is_that_of_the_conditional_branch():
    student, labels = branching(*errors())
    alone = replace(student, velocity=student.branches[0]), Labels(target=labels.target_conditional)
    torch.testing.assert_close(BranchDistance(0.0).loss(student, labels)[0], TransitionKL(Uniform()).loss(*alone)[0])


@pytest.mark.parametrize("scale", [1.5, 4.5])
def test_what_guided_matching_hides_the_branch_distance_sees(scale):
    e_minus = torch.ones(ROWS, 2, dtype=torch.float64)
    student, labels = branching((scale - 1) / scale * e_minus, e_minus, scale)
    assert TransitionKL(Uniform()).loss(student, labels)[0] < 1e-28
    assert BranchDistance(0.0).loss(student, labels)[0] > 0.1
    torch.testing.assert_close(  # e₊ - e₋ = -e₋ / s
        BranchDistance(1.0).loss(student, labels)[0], e_minus.new_tensor(((scale - 1) ** 2 + 1) / scale**2)
    )


def test_the_branch_distance_is_zero_at_the_teacher_s_branches_alone():
    nothing = torch.zeros(ROWS, 2, dtype=torch.float64)
    for e_plus, e_minus in itertools.product((nothing, nothing + 0.1), repeat=2):
        loss, _ = BranchDistance(0.5).loss(*branching(e_plus, e_minus))
        assert (loss < 1e-28) == (not e_plus.any() and not e_minus.any())


def test_branches_are_missed_by_name():
    student, labels = branching(*errors())
    with pytest.raises(ValueError, match=r"needs labels.target_unconditional, .* add a TeacherCallback"):
        BranchDistance().loss(student, replace(labels, target_unconditional=None))
    with pytest.raises(ValueError, match=r"compares branches, but the step has none; set Transition\.branches"):
        BranchDistance().loss(student.detach(), labels)


# ---------------------------------------------------------------------------------------------------------------- a sum


@DIMENSIONS
def test_the_gradient_of_a_sum_is_the_weighted_sum_of_gradients(dimensions):
    walk = Walk(dimensions)
    parts = [TransitionKL(), ReturnToGo(pathwise=False)]
    whole, half = (walk.expected_gradient(WeightedSum(parts, weights)) for weights in ([1.0, 1.0], [0.5, 1.0]))
    torch.testing.assert_close(whole, walk.whole())
    torch.testing.assert_close(half, walk.whole() - 0.5 * walk.pathwise())


@pytest.mark.parametrize("around", [True, False], ids=["anchored sum", "sum of an anchored"])
def test_reward_and_distillation_add_with_an_anchor_inside_or_outside(theta, around):
    student, labels = visited(theta)
    reward, teacher = ClippedSurrogate(), TransitionKL(Uniform())
    found = (
        Anchored(WeightedSum([reward, teacher], [0.1, 2.0]), strength=0.3)
        if around
        else WeightedSum([Anchored(reward, strength=3.0), teacher], [0.1, 2.0])
    )
    assert labels_of(found) == {"x_next", "log_prob_old", "advantage", "target", "anchor"}
    pull = TransitionKL(ExactKL())
    expected = 0.1 * gradient(reward, student, labels, theta) + 2.0 * gradient(teacher, student, labels, theta)
    expected += 0.3 * gradient(pull, student, replace(labels, target=labels.anchor), theta)
    torch.testing.assert_close(gradient(found, student, labels, theta), expected)


def test_every_metric_of_a_sum_is_kept_under_a_name_of_its_own(theta):
    student, labels = visited(theta)
    parts = [WeightedSum([TransitionKL(), TransitionKL(Uniform())]), LogRatioSurrogate(), ClippedSurrogate()]
    found = WeightedSum(parts).loss(student, labels)[1]
    expected = {"distill": TransitionKL(), "distill_2": TransitionKL(Uniform()), "distill_3": LogRatioSurrogate()}
    for stage, part in expected.items():
        assert found[f"{stage}/loss"] == part.loss(student, labels)[1]["distill/loss"]
    assert len(found) == sum(len(part.loss(student, labels)[1]) for part in parts)


def test_weights_and_objectives_of_a_sum_are_as_many():
    with pytest.raises(ValueError, match="there are 1 weights for 2 objectives; expected one each"):
        WeightedSum([TransitionKL(), FlowMatching()], [1.0])
