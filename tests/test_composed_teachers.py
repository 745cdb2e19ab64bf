"""The laws of teachers made of teachers: what they compute, and that nobody is asked twice for it."""

from itertools import product

import pytest
import tiny
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from jsonargparse import ArgumentParser, Namespace
from peft import PeftModel

import flowopd
from flowopd.core import CPS, Anchored, DanceSDE, FlowSDE, TransitionKL, guided
from flowopd.preflight.forwards import SAMPLED, TRAINED, count_forwards
from flowopd.preflight.plan import Hardware, plan
from flowopd.records import Conditioning
from flowopd.teachers import BaseTeacher, Beyond, Blend, FullTeacher, LoRATeacher, Piecewise, Router, Teacher
from flowopd.teachers.composed import ask
from flowopd.training import AnchorCallback, OPDStudent, TeacherCallback

SIGMA = torch.tensor([1.0, 0.8, 0.5, 0.2])


class Times:
    """A teacher whose velocity is a multiple of the state; counts the rows of every forward."""

    def __init__(self, factor: float):
        self.factor = factor
        self.rows: list[int] = []

    def attach(self, backbone): ...

    def velocity(self, x, sigma, cond):
        self.rows.append(len(x))
        return self.factor * x

    def fingerprint(self):
        return f"times {self.factor}"


def state(rows: int = 4) -> tuple:
    cond = Conditioning(torch.zeros(rows, 1, 1), torch.zeros(rows, 1))
    return torch.arange(1.0, rows + 1)[:, None, None, None], SIGMA[:rows], cond


def factors(teacher: Teacher) -> list[float]:
    """What the states are multiplied by, row for row."""
    x, sigma, cond = state()
    return (teacher.velocity(x, sigma, cond) / x).flatten().tolist()


# ------------------------------------------------------------------------------------------------------------- algebra


@pytest.mark.parametrize("strength", [1.25, 0.5, 3.0])
def test_beyond_is_the_reference_and_lambda_times_the_way_to_the_teacher(strength):
    teacher, reference = Times(3.0), Times(2.0)
    x, sigma, cond = state()
    found = Beyond(teacher, reference, strength).velocity(x, sigma, cond)
    torch.testing.assert_close(found, guided(3 * x, 2 * x, strength))


@pytest.mark.parametrize(("strength", "asked"), [(1.0, 0), (0.0, 1)], ids=["teacher", "reference"])
def test_at_one_beyond_is_the_teacher_and_at_zero_the_reference_and_the_other_is_not_asked(strength, asked):
    pair = Times(1 / 3), Times(1 / 7)
    x, sigma, cond = state()
    assert torch.equal(Beyond(*pair, strength).velocity(x, sigma, cond), pair[asked].factor * x)
    assert pair[1 - asked].rows == []


DYNAMICS = pytest.mark.parametrize("dynamics", [FlowSDE(0.7), DanceSDE(0.3), CPS(0.5)], ids=["flow", "dance", "cps"])


def log_probs(dynamics, velocity, x_next):
    x = torch.ones(4, 1, 2, 2, dtype=torch.float64)
    return dynamics.step(x, velocity, SIGMA.double(), SIGMA.double() / 2).log_prob(x_next)


@DYNAMICS
def test_a_step_beyond_is_the_gaussian_of_the_teacher_s_power_over_the_reference_s(dynamics):
    """log p_λ = λ·log p_T + (1 - λ)·log p_ref + constant, for the λ of ``Beyond``."""
    teacher, reference, *states = torch.randn(5, 4, 1, 2, 2, dtype=torch.float64)
    mixture = guided(teacher, reference, 1.25)
    off = [
        log_probs(dynamics, mixture, x)
        - 1.25 * log_probs(dynamics, teacher, x)
        + 0.25 * log_probs(dynamics, reference, x)
        for x in states
    ]
    torch.testing.assert_close(off[1], off[0])
    torch.testing.assert_close(off[2], off[0])


@DYNAMICS
def test_a_step_of_a_blend_is_the_gaussian_of_the_product_of_powers(dynamics):
    """log p = Σ_k α_k·log p_k + constant."""
    first, second, third, *states = torch.randn(5, 4, 1, 2, 2, dtype=torch.float64)
    shares = {0.5: first, 0.3: second, 0.2: third}
    mixture = sum(share * velocity for share, velocity in shares.items())
    off = [
        log_probs(dynamics, mixture, x) - sum(a * log_probs(dynamics, v, x) for a, v in shares.items()) for x in states
    ]
    torch.testing.assert_close(off[1], off[0])


def test_only_the_proportions_of_a_blend_s_weights_matter():
    for weights in ([0.25, 0.75], [1.0, 3.0]):
        assert factors(Blend([Times(2.0), Times(6.0)], weights)) == [5.0] * 4


def test_a_blend_s_weights_may_follow_the_noise_level():
    falling, rising = Piecewise([(0.2, 1.0), (0.8, 0.0)]), Piecewise([(0.2, 0.0), (0.8, 1.0)])
    found = factors(Blend([Times(2.0), Times(6.0)], [falling, rising]))
    assert found == pytest.approx([6.0, 6.0, 4.0, 2.0])


def test_where_a_blend_switches_only_one_teacher_is_asked():
    low, high = Times(2.0), Times(6.0)
    blend = Blend([low, high], [Piecewise([(0.5, 1.0), (0.5, 0.0)]), Piecewise([(0.5, 0.0), (0.5, 1.0)])])
    assert factors(blend) == [6.0, 6.0, 6.0, 2.0]  # the level of a jump is on its later side
    assert (low.rows, high.rows) == ([1], [3])


def test_compositions_compose():
    inner = Blend([Times(2.0), Times(6.0)], [1, 1])  # 4
    assert factors(Beyond(inner, Beyond(Times(3.0), Times(1.0), 0.5), 1.5)) == [2 + 1.5 * (4 - 2)] * 4


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "there are 1 weights for 2 teachers"),
        ([1.0, -1.0], r"weights\[1\] is -1.0; expected at least 0.0"),
        ([0.0, 0.0], "all 0 at some noise level"),
        ([0.0, Piecewise([(0.2, 0.0), (0.8, 1.0)])], "all 0 at some noise level"),
    ],
)
def test_weights_that_blend_nothing_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        Blend([Times(1.0), Times(2.0)], weights)


@pytest.mark.parametrize("points", [[(0.5, 1.0)], [(0.5, 1.0), (0.2, 0.0)]], ids=["one", "falling"])
def test_points_are_two_or_more_by_rising_noise_level(points):
    with pytest.raises(ValueError, match=r"expected two or more \(σ, share\) by rising σ"):
        Piecewise(points)


def test_a_fingerprint_is_of_parts_and_numbers():
    made = [Beyond(Times(a), Times(b), s) for a, b, s in product((1.0, 2.0), (3.0, 4.0), (1.25, 1.5))]
    made += [Blend([Times(1.0), Times(3.0)], weights) for weights in ([1, 2], [2, 1], [1, Piecewise([(0, 1), (1, 2)])])]
    assert len({teacher.fingerprint() for teacher in made}) == len(made)
    assert Beyond(Times(1.0), Times(3.0), 2).fingerprint() == Beyond(Times(1.0), Times(3.0), 2.0).fingerprint()


# ------------------------------------------------------------------------------------------------------------ forwards


def test_what_two_teachers_of_a_batch_share_is_asked_once_about_both_their_rows():
    shared, red, green = Times(1.0), Times(2.0), Times(3.0)
    router = Router({"red": Beyond(red, shared, 2.0), "green": Beyond(green, shared, 3.0)})
    x, sigma, cond = state()
    found = router.velocity(x, sigma, cond, ["red", "green", "red", "green"])
    assert (found / x).flatten().tolist() == [3.0, 7.0, 3.0, 7.0]
    assert (shared.rows, red.rows, green.rows) == ([4], [2], [2])


def test_soft_routing_by_task_asks_every_teacher_once():
    pair = [Times(2.0), Times(6.0)]
    router = Router({"red": Blend(pair, [3, 1]), "green": Blend(pair, [1, 3]), "blue": pair[0]})
    x, sigma, cond = state()
    found = router.velocity(x, sigma, cond, ["blue", "red", "green", "red"])
    assert (found / x).flatten().tolist() == [2.0, 3.0, 5.0, 3.0]
    assert [teacher.rows for teacher in pair] == [[4], [3]]


def test_an_anchor_that_is_also_a_part_is_asked_once():
    base, expert = Times(1.0), Times(2.0)
    x, sigma, cond = state()
    groups = Router({"red": Beyond(expert, base, 1.5)}).groups(["red"] * 4)
    found = ask({"target": groups, "anchor": [(base, range(4))]}, x, sigma, cond)
    assert torch.equal(found["target"], 2.5 * x)
    assert torch.equal(found["anchor"], x)
    assert (base.rows, expert.rows) == ([4], [4])


@pytest.mark.parametrize("tasks", [["red"] * 3, ["green"] * 3, ["red", "green", "red"]], ids=["red", "green", "both"])
def test_in_lockstep_every_part_is_asked_once_whatever_the_rows(tasks):
    shared, red, green = Times(1.0), Times(2.0), Times(3.0)
    low = Blend([green, shared], [Piecewise([(0.1, 1.0), (0.2, 0.0)]), Piecewise([(0.1, 0.0), (0.2, 1.0)])])
    Router({"red": Beyond(red, shared), "green": low}, True).velocity(*state(3), tasks)
    assert [len(teacher.rows) for teacher in (shared, red, green)] == [1, 1, 1]


# --------------------------------------------------------------------------------------------- networks and adapters


@pytest.fixture
def counted(monkeypatch):
    """The rows of every forward of a transformer, by its number of blocks."""
    forwards: list[tuple[int, int]] = []
    forward = SD3Transformer2DModel.forward

    def spy(self, *args, **kwargs):
        forwards.append((len(self.transformer_blocks), len(kwargs["hidden_states"])))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(SD3Transformer2DModel, "forward", spy)
    return forwards


@pytest.fixture(scope="module")
def experts(tiny_pipeline, tmp_path_factory):
    return [tiny.expert(tmp_path_factory.mktemp("expert"), tiny_pipeline, seed=seed) for seed in (1, 2)]


def test_teachers_that_say_the_same_are_one_although_they_are_several_objects(tiny_pipeline, experts, counted):
    backbone = tiny.loaded(tiny_pipeline)
    red = Beyond(LoRATeacher(experts[0]), BaseTeacher(2.0))
    green = Beyond(LoRATeacher(experts[1]), BaseTeacher(2.0))
    plain = {name: LoRATeacher(path) for name, path in zip(("red", "green"), experts, strict=True)}
    base = BaseTeacher(2.0)
    for teacher in (red, green, *plain.values(), base):
        teacher.attach(backbone)
    x, sigma, cond = torch.randn(4, 4, 8, 8), SIGMA, backbone.encode(["a", "b", "c", "d"])
    tasks = ["red", "green", "red", "green"]
    apart = Router(plain).velocity(x, sigma, cond, tasks)
    expected = guided(apart, base.velocity(x, sigma, cond), 1.25)
    counted.clear()
    torch.testing.assert_close(
        Router({"red": red, "green": green}).velocity(x, sigma, cond, tasks), expected, rtol=0, atol=1e-5
    )
    assert [rows for _, rows in counted] == [12]  # 2 of an expert, 8 of the guided base for both, 2 of the other expert


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A deeper and wider model on the same latents and texts, and two adapters of it, by peft alone."""
    folder = tmp_path_factory.mktemp("large")
    pipeline = tiny.pipeline(seed=3)
    pipeline.transformer = tiny.transformer(num_layers=3, num_attention_heads=3, caption_projection_dim=24)
    pipeline.save_pretrained(folder)
    return str(folder), [tiny.expert(folder / f"expert{seed}", str(folder), seed=seed) for seed in (1, 2)]


def test_a_larger_model_with_an_adapter_teaches_as_peft_would_with_it(tiny_pipeline, large):
    model, adapters = large
    backbone, x = tiny.loaded(tiny_pipeline), torch.randn(2, 4, 8, 8)
    teacher = FullTeacher(tiny.backbone(model), adapter=adapters[0])
    teacher.attach(backbone)
    cond = backbone.encode(["a", "b"])
    stock = PeftModel.from_pretrained(tiny.stock_transformer(model), adapters[0])
    expected = stock(x, cond.tokens, cond.pooled, 1000 * SIGMA[:2], return_dict=False)[0].detach()
    torch.testing.assert_close(teacher.velocity(x, SIGMA[:2], cond), expected, rtol=0, atol=1e-5)


def test_teachers_of_one_larger_model_carry_it_once_and_ask_it_once_per_adapter(tiny_pipeline, large, counted):
    model, adapters = large
    backbone = tiny.loaded(tiny_pipeline)
    full = {task: FullTeacher(tiny.backbone(model), adapter=path) for task, path in zip("rg", adapters, strict=True)}
    router = Router({task: Beyond(teacher, FullTeacher(tiny.backbone(model))) for task, teacher in full.items()})
    for teacher in router.teachers.values():
        teacher.attach(backbone)
    assert full["r"].backbone.network is full["g"].backbone.network
    router.velocity(torch.randn(4, 4, 8, 8), SIGMA, backbone.encode(["a", "b", "c", "d"]), list("rgrg"))
    assert counted == [(3, 2), (3, 4), (3, 2)]


def test_texts_are_encoded_once_for_models_of_every_size(tiny_pipeline, large, monkeypatch):
    backbone = tiny.loaded(tiny_pipeline)
    teacher = Beyond(FullTeacher(tiny.backbone(large[0]), guidance_scale=4.5), BaseTeacher(4.5))
    teacher.attach(backbone)
    backbone.prepare(["a"])
    monkeypatch.setattr(StableDiffusion3Pipeline, "encode_prompt", lambda *_, **__: pytest.fail("encoded again"))
    assert teacher.velocity(torch.randn(1, 4, 8, 8), SIGMA[:1], backbone.encode(["a"])).isfinite().all()


def test_a_fingerprint_knows_its_own_adapter_and_no_other_s(tiny_pipeline, large):
    backbone = tiny.loaded(tiny_pipeline)
    plain, first, second = (FullTeacher(tiny.backbone(large[0]), adapter=path) for path in (None, *large[1]))
    plain.attach(backbone)
    before = plain.fingerprint()
    first.attach(backbone)
    second.attach(backbone)
    assert plain.fingerprint() == before
    assert len({teacher.fingerprint() for teacher in (plain, first, second)}) == 3


def test_a_fingerprint_is_the_same_in_whatever_order_a_device_adds(tiny_pipeline, large):
    plain = FullTeacher(tiny.backbone(large[0]))
    plain.attach(tiny.loaded(tiny_pipeline))
    before, parameter = plain.fingerprint(), next(p for p in plain.backbone.network.parameters() if p.dim() == 2)
    with torch.no_grad():
        parameter.copy_(parameter.flip(0))
        assert plain.fingerprint() == before
        parameter[0, 0] = torch.nextafter(parameter[0, 0], torch.tensor(torch.inf))
    assert plain.fingerprint() != before


# ----------------------------------------------------------------------------------------------------------- in a run


def composed(experts, large) -> list:
    """Two teachers that share their reference with each other, and the second also with the anchor."""
    blend = Blend([Beyond(LoRATeacher(experts[1]), BaseTeacher(1.5)), FullTeacher(tiny.backbone(large[0]))], [2, 1])
    return [
        TeacherCallback(["red"], Beyond(LoRATeacher(experts[0], guidance_scale=2.0), BaseTeacher(1.5))),
        TeacherCallback(["green"], blend),
        AnchorCallback(BaseTeacher(1.5)),
    ]


@pytest.mark.parametrize("fused", [False, True], ids=["whole", "fused"])
def test_a_plan_counts_the_forwards_that_a_fit_takes(tiny_pipeline, experts, large, counted, tmp_path, fused):
    sizes = {"fused": fused, "prompts_per_iteration": 4, "group_size": 1, "batch_size": 4}
    callbacks, objective = composed(experts, large), Anchored(TransitionKL())
    policy = tiny.policy(OPDStudent, tiny_pipeline, objective)
    found = count_forwards(policy, tiny.data("red", "green", **sizes), callbacks, accumulate=3)
    assert found.pop(TRAINED) == 12
    assert found.pop(SAMPLED, 16) == 16
    assert found == {
        "teacher-red": 3 * 2 * 2,
        "teacher-red + teacher-green + anchor": 3 * 4 * 2,
        "teacher-green": 3 * 2,
        f"teacher-green ({large[0]})": 3 * 2,
    }
    trainer = tiny.trainer(tmp_path, callbacks, accumulate_grad_batches=3)
    counted.clear()
    trainer.fit(policy, tiny.data("red", "green", **sizes))
    assert sum(rows for _, rows in counted) == sum(found.values()) + 12 + 16 * (not fused)
    assert sum(rows for blocks, rows in counted if blocks == 3) == found[f"teacher-green ({large[0]})"]


def test_a_plan_weighs_what_is_carried_once_and_what_a_larger_model_computes(tiny_pipeline, experts, large):
    policy = tiny.policy(OPDStudent, tiny_pipeline, Anchored(TransitionKL()))
    made = plan(policy, tiny.data("red", "green"), composed(experts, large), Hardware(accumulate=3))
    weights = {name: size for name, size in made.resident.items() if name.startswith("weights of")}
    assert weights.keys() == {"weights of teacher-red", "weights of teacher-green"}
    network = tiny.stock_transformer(large[0])
    own = sum(p.nbytes for p in (*network.parameters(), *network.buffers()))
    assert weights["weights of teacher-green"] == weights["weights of teacher-red"] + own
    per_row = {name: made.flop[name] / rows for name, rows in made.forwards.items()}
    assert per_row[f"teacher-green ({large[0]})"] > 1.5 * per_row["teacher-green"] == 1.5 * per_row[TRAINED]


def test_a_student_at_its_composed_teacher_asks_for_nothing(tiny_pipeline, experts, tmp_path):
    student = tiny.policy(OPDStudent, tiny_pipeline, TransitionKL(), start=experts[0])
    teacher = Blend([Beyond(LoRATeacher(experts[0]), BaseTeacher(), 1.0)], [5.0])
    trainer = tiny.trainer(tmp_path, [TeacherCallback(["red"], teacher)], accumulate_grad_batches=3)
    trainer.fit(student, tiny.data(fused=True))
    assert trainer.callback_metrics["distill/velocity_mse"] == 0


def test_yaml_composes_teachers():
    text = """
    teacher:
      class_path: flowopd.Beyond
      init_args:
        teacher:
          class_path: flowopd.Blend
          init_args:
            teachers:
              - {class_path: flowopd.LoRATeacher, init_args: {path: some/lora, guidance_scale: 1.4}}
              - class_path: flowopd.FullTeacher
                init_args:
                  backbone: {class_path: flowopd.SD3Backbone, init_args: {path: some/large}}
                  adapter: {path: some/lora, subfolder: large}
            weights:
              - 0.5
              - {class_path: flowopd.Piecewise, init_args: {points: [[0.2, 0.0], [0.8, 1.0]]}}
        reference: {class_path: flowopd.BaseTeacher}
        strength: 1.25
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--teacher", type=Teacher)
    made: Namespace = parser.instantiate_classes(parser.parse_string(text))
    blend, reference = made.teacher.teachers
    assert isinstance(made.teacher, flowopd.Beyond)
    assert isinstance(reference, BaseTeacher)
    assert (blend.teachers[0].guidance_scale, str(blend.teachers[1].adapter)) == (1.4, "some/lora/large")
    assert [w.tolist() for w in blend.shares(torch.tensor([0.8]))] == [[pytest.approx(1 / 3)], [pytest.approx(2 / 3)]]
