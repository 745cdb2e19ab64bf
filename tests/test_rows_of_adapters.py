"""The laws of adapters by row: one forward answers several teachers, each as if it were asked alone."""

import pytest
import tiny
import torch
from peft.tuners.lora import Linear as PeftLinear

from flowopd.models import LoRASpec, Question
from flowopd.models.adapters.lora import add_adapter, mixes_rows, use_adapter, use_adapters
from flowopd.teachers import BaseTeacher, Beyond, LoRATeacher, composed
from flowopd.teachers.composed import ask


@pytest.fixture(scope="module")
def experts(tiny_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    targets = {"narrow": ["attn.to_q"], "wide": ["attn.to_q", "attn.to_k", "ff.net.0.proj"]}
    return {
        name: tiny.expert(folder / name, tiny_pipeline, seed, 4, 8, own)
        for seed, (name, own) in enumerate(targets.items())
    }


@pytest.fixture(scope="module")
def base(tiny_pipeline, experts):
    ready = tiny.loaded(tiny_pipeline)
    for teacher in teachers(experts):
        teacher.attach(ready)
    return ready


def teachers(experts) -> list:
    narrow, wide = (
        LoRATeacher(experts[name], guidance_scale=scale) for name, scale in (("narrow", 4.5), ("wide", 1.0))
    )
    return [narrow, wide, BaseTeacher(2.0), Beyond(narrow, BaseTeacher(2.0))]


def states(base, rows: int = 4):
    x = torch.randn(rows, *base.latent_shape())
    return x, torch.linspace(0.9, 0.2, rows), base.encode([f"red {i}" for i in range(rows)])


def answers(base, experts, wanted, monkeypatch, limit: int, **options) -> tuple[dict, int]:
    """What is found by asking up to so many tokens together, and by how many forwards."""
    forwards = []
    handle = base.network.register_forward_pre_hook(lambda *_: forwards.append(1))
    monkeypatch.setattr(composed, "TOGETHER", limit)
    torch.manual_seed(0)
    found = ask(wanted, *states(base), **options)
    handle.remove()
    return found, len(forwards)


@pytest.mark.parametrize("lockstep", [False, True])
def test_teachers_asked_together_answer_as_each_alone(base, experts, monkeypatch, lockstep):
    narrow, wide, reference, beyond = teachers(experts)
    for teacher in (narrow, wide, reference, beyond):
        teacher.attach(base)
    wanted = {"target": [(beyond, [0, 2]), (wide, [1, 3]), (narrow, [])], "anchor": [(reference, range(4))]}
    apart, many = answers(base, experts, wanted, monkeypatch, 0, lockstep=lockstep)
    together, one = answers(base, experts, wanted, monkeypatch, 10**6, lockstep=lockstep)
    assert (many, one) == (3, 1)
    for name in wanted:
        torch.testing.assert_close(together[name], apart[name], atol=2e-5, rtol=0)


def test_a_teacher_that_answers_in_its_own_way_is_asked_by_itself(base, experts, monkeypatch):
    class Half(LoRATeacher):
        def velocity(self, x, sigma, cond):
            return 0.5 * super().velocity(x, sigma, cond)

    plain, half = (kind(experts["wide"], guidance_scale=scale) for kind, scale in ((LoRATeacher, 1.0), (Half, 2.0)))
    for teacher in (plain, half):
        teacher.attach(base)
    wanted = {"target": [(half, range(4))], "anchor": [(plain, range(4))]}
    found, _ = answers(base, experts, wanted, monkeypatch, 10**6)
    torch.manual_seed(0)
    torch.testing.assert_close(found["target"], half.velocity(*states(base)))


def test_nothing_is_left_behind_when_several_were_asked(base, experts):
    names = [teacher.asks.adapter for teacher in prepared(base, experts)]
    torch.manual_seed(0)
    x, sigma, cond = states(base)
    before = base.velocity(x, sigma, cond, names[0])
    base.velocities(x, sigma, cond, [Question(name, 1.0, [0]) for name in (*names, None)])
    assert torch.equal(base.velocity(x, sigma, cond, names[0]), before)
    with (
        pytest.raises(KeyError, match="no adapter named 'lost'"),
        use_adapters(base.network, [(names[0], 1), ("lost", 1)]),
    ):
        pass
    assert torch.equal(base.velocity(x, sigma, cond, names[0]), before)


def prepared(base, experts) -> list[LoRATeacher]:
    found = teachers(experts)[:2]
    for teacher in found:
        teacher.attach(base)
    return found


def test_adapters_beside_the_blocks_are_asked_one_by_one(tiny_pipeline):
    base = tiny.loaded(tiny_pipeline)
    add_adapter(base.network, "outside", LoRASpec(rank=4, targets=["attn.to_q", "proj_out"]))
    assert not mixes_rows(base.network)
    found = base.velocities(*states(base), [Question("outside", 1.0, [0, 1]), Question(None, 4.5, [2])])
    assert [len(velocity) for velocity in found] == [2, 1]


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_layer_answers_and_learns_as_stock_peft(weights, autocast):
    layer = torch.nn.Sequential(torch.nn.Linear(24, 40).to(weights)).requires_grad_(False)
    add_adapter(layer, "student", LoRASpec(rank=4, alpha=6), ["0"])
    torch.nn.init.normal_(layer[0].lora_B["student"].weight)
    x, found = torch.randn(2, 3, 24, dtype=weights, requires_grad=True), []
    factors = [x, layer[0].lora_A["student"].weight, layer[0].lora_B["student"].weight]
    for forward in (layer[0].forward, lambda x: PeftLinear.forward(layer[0], x)):
        with use_adapter(layer, "student"), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = forward(x)
        found.append((y, *torch.autograd.grad(y.float().square().sum(), factors)))
    half = autocast or weights == torch.bfloat16
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(
            ours, theirs, atol=0.02 * float(theirs.detach().abs().max()) if half else 1e-5, rtol=1e-5
        )
