"""The law of folding: without guidance, a student can be its guided teacher, and takes half its forwards."""

from collections import Counter

import pytest
import tiny
import torch
from lightning import Callback
from peft import LoraConfig, get_peft_model
from torch import nn

from flowopd.core import ShiftedSchedule
from flowopd.models import SD3Backbone
from flowopd.records import Conditioning
from flowopd.rollouts import Sampler
from flowopd.teachers import LoRATeacher
from flowopd.training import OPDStudent, TeacherCallback

SCALE = 4.5


class Linear(nn.Module):
    """v(x, c) = A x + B c: of an empty text, c = 0, so guidance multiplies B by its scale."""

    def __init__(self) -> None:
        super().__init__()
        self.of_x, self.of_c = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        nn.init.zeros_(self.of_c.weight)

    def forward(self, hidden_states, timestep, encoder_hidden_states, pooled_projections, return_dict):
        v = self.of_x(hidden_states.flatten(1)) + self.of_c(pooled_projections)
        return (v.reshape(hidden_states.shape),)


class LinearBackbone(SD3Backbone):
    """The backbone's own guidance around a linear network; counts rows by adapter."""

    def __init__(self) -> None:
        super().__init__("linear", dtype="float32")
        self.rows = Counter()

    def load(self, device="cpu") -> None:
        torch.manual_seed(0)
        self._network = self._network or Linear().requires_grad_(False)

    def latent_shape(self) -> tuple[int, int, int]:
        return 1, 2, 2

    def schedule(self) -> ShiftedSchedule:
        return ShiftedSchedule()

    def prepare(self, texts) -> None:
        """Nothing is read."""

    def encode(self, texts) -> Conditioning:
        pooled = [torch.tensor([len(text), text.count("r"), text.count("1"), text.count("2")]) for text in texts]
        return Conditioning(torch.zeros(len(texts), 1, 1), torch.stack(pooled).float())

    def velocity(self, x, sigma, cond, adapter=None, guidance_scale=1.0):
        self.asked = adapter
        return super().velocity(x, sigma, cond, adapter, guidance_scale)

    def _forward(self, x, sigma, cond):
        self.rows[self.asked] += len(x)
        return super()._forward(x, sigma, cond)


class Gradients(Callback):
    """Keeps losses and the largest gradient of every backward."""

    def __init__(self) -> None:
        self.losses, self.gradients = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))

    def on_after_backward(self, trainer, pl_module):
        self.gradients += [float(p.grad.abs().max()) for p in pl_module.parameters() if p.grad is not None]


def adapter(folder, scale: float) -> str:
    """The same random B, times a scale."""
    model = get_peft_model(Linear(), LoraConfig(r=2, lora_alpha=2 * scale, target_modules=["of_c"]))
    noise = torch.Generator().manual_seed(1)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=noise)
    model.save_pretrained(str(folder))
    return str(folder)


def distil(folder, guidance: float, fused: bool) -> tuple[Gradients, LinearBackbone]:
    """One iteration of a student whose conditional branch is the teacher guided by SCALE."""
    teacher, seen = LoRATeacher(adapter(folder / "teacher", 1), guidance_scale=SCALE), Gradients()
    backbone, sampler = LinearBackbone(), Sampler(num_steps=4, guidance_scale=guidance)
    policy = OPDStudent(backbone, sampler=sampler, start=adapter(folder / "student", SCALE))
    trainer = tiny.trainer(folder, [TeacherCallback(["red"], teacher), seen], accumulate_grad_batches=3)
    trainer.fit(policy, tiny.data(group_size=1, fused=fused))
    return seen, backbone


@pytest.mark.parametrize("fused", [False, True])
def test_a_student_that_is_its_guided_teacher_has_nothing_to_learn_without_guidance(tmp_path, fused):
    seen, backbone = distil(tmp_path, 1.0, fused)
    assert max(seen.losses) < 1e-10
    assert max(seen.gradients) < 1e-5
    teachers = backbone.rows.keys() - {"student"}
    rollout = 0 if fused else 4 * 4  # four rows, four steps, of which three are trained
    assert backbone.rows["student"] == rollout + 4 * 3  # one branch
    assert [backbone.rows[teacher] for teacher in teachers] == [2 * 4 * 3]


def test_guided_once_more_it_has(tmp_path):
    seen, backbone = distil(tmp_path, SCALE, True)
    assert min(seen.losses) > 1e-4
    assert backbone.rows["student"] == 2 * 4 * 3
