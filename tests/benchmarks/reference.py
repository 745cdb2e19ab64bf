"""One update as the public Flow-OPD code makes it, for comparison: stock diffusers and peft, nothing of ours.

Student, teachers and MAR are each a whole pipeline of its own in float32. Every epoch encodes all texts, row by row of
the batch, and the empty one; rolls out with guidance and keeps the trajectory; decodes the pictures; then goes through
the trained steps, where student, the task's teacher and MAR are asked one by one, each with guidance. Rewards are
left out, which the loss does not read.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from flowopd.models.adapters.lora import ATTENTION

NOISE, MAR = 0.7, 0.04


class Texts(NamedTuple):
    tokens: Tensor
    pooled: Tensor


class Reference:
    """A student, its teachers and its optimiser.

    Args:
        base: pipeline folder.
        teachers: adapter folder of every task.
        anchor: adapter folder of MAR.
        guidance: of all of them.
        sigmas: (T + 1,) noise levels of a rollout; all steps but the last are trained.
        text_length: tokens of T5 at most.
    """

    def __init__(
        self, base: Path, teachers: Mapping[str, str], anchor: str, guidance: float, sigmas: Tensor, text_length: int
    ) -> None:
        self.guidance, self.sigmas, self.text_length = guidance, sigmas, text_length
        self.pipeline = StableDiffusion3Pipeline.from_pretrained(base)
        config = LoraConfig(r=32, lora_alpha=64, init_lora_weights="gaussian", target_modules=list(ATTENTION))
        self.student = get_peft_model(self.pipeline.transformer, config)
        self.teachers = {task: _teacher(base, path) for task, path in teachers.items()}
        self.anchor = _teacher(base, anchor)
        self.parameters = [p for p in self.student.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=1e-4)

    def update(self, texts: Sequence[str], tasks: Sequence[str], noise: Tensor) -> float:
        """Train on B pictures whose noise is (T, B, C, H, W): that of the start, and of every noisy step."""
        self.optimizer.zero_grad()
        loss = self.gradient(texts, tasks, noise)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return loss

    def gradient(self, texts: Sequence[str], tasks: Sequence[str], noise: Tensor) -> float:
        """Add the gradient of an update; return its loss."""
        with torch.no_grad():
            both = self._texts(["", *texts])
            negative, positive = (Texts(*(part[rows] for part in both)) for rows in (slice(1), slice(1, None)))
            cond = Texts(*(torch.cat([n.expand_as(p), p]) for n, p in zip(negative, positive, strict=True)))
            states = self._rollout(cond, noise)
            config = self.pipeline.vae.config
            self.pipeline.vae.decode(states[-1] / config.scaling_factor + config.shift_factor)
        trained, total = len(self.sigmas) - 2, 0.0
        for j in range(trained):
            loss = self._loss(states[j], j, cond, tasks) / trained
            loss.backward()
            total += loss.item()
        return total

    def _texts(self, texts: Sequence[str]) -> Texts:
        rows = []
        for text in texts:
            tokens, _, pooled, _ = self.pipeline.encode_prompt(
                text, None, None, do_classifier_free_guidance=False, max_sequence_length=self.text_length
            )
            rows.append((tokens, pooled))
        return Texts(*(torch.cat(parts) for parts in zip(*rows, strict=True)))

    def _rollout(self, cond: Texts, noise: Tensor) -> Tensor:
        """States (T + 1, B, C, H, W)."""
        states = [noise[0]]
        for j in range(len(self.sigmas) - 1):
            mean, std = self._step(self.student, states[-1], j, cond)
            states.append(mean + std * noise[j + 1] if j + 1 < len(noise) else mean)
        return torch.stack(states)

    def _step(self, model: Any, x: Tensor, j: int, cond: Texts) -> tuple[Tensor, Tensor]:
        """Mean and width of the Flow-SDE's step j."""
        sigma, following = self.sigmas[j], self.sigmas[j + 1]
        dt = following - sigma
        time = (1000 * sigma).expand(2 * len(x))
        output = model(torch.cat([x, x]), cond.tokens, cond.pooled, time, return_dict=False)[0]
        unconditional, conditional = output.chunk(2)
        v = unconditional + self.guidance * (conditional - unconditional)
        g = NOISE * (sigma / (1 - (self.sigmas[1] if sigma == 1 else sigma))).sqrt()
        mean = x * (1 + g**2 * dt / (2 * sigma)) + v * (1 + g**2 * (1 - sigma) / (2 * sigma)) * dt
        return mean, g * (-dt).sqrt()

    def _loss(self, x: Tensor, j: int, cond: Texts, tasks: Sequence[str]) -> Tensor:
        mean, std = self._step(self.student, x, j, cond)
        g2 = std**2 / (self.sigmas[j] - self.sigmas[j + 1])
        with torch.no_grad():
            targets = torch.empty_like(x)
            for task, teacher in self.teachers.items():
                rows = torch.tensor([i for i, other in enumerate(tasks) if other == task])
                own = Texts(*(part[torch.cat([rows, len(x) + rows])] for part in cond))
                if len(rows):
                    targets[rows] = self._step(teacher, x[rows], j, own)[0]
            anchor, _ = self._step(self.anchor, x, j, cond)
        distances = ((mean - other).square().mean((1, 2, 3)) / (2 * g2) for other in (targets, anchor))
        taught, anchored = distances
        return taught.mean() + MAR * anchored.mean()


def _teacher(base: Path, adapter: str) -> Any:
    """A pipeline of its own, whose text encoders and autoencoder stay."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(base)
    model = PeftModel.from_pretrained(pipeline.transformer, adapter)
    model.pipeline_around_it = [pipeline]  # in a list: no module of the model
    return model.requires_grad_(False).eval()
