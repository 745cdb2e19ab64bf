"""Pre-training of the tiles world: full-parameter flow matching on pictures rendered on the fly."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn import functional as F

from flowopd.core.paths import interpolate
from flowopd.core.ranges import above, at_least, within
from flowopd.tiles.build import REWARDS, load, paint
from flowopd.tiles.rewards import Crispness
from flowopd.tiles.world import TASKS, TilesPrompts, parse, render


@dataclass(frozen=True)
class Pairs:
    """A sized, endless-by-seed stream of (images, texts); epoch e of seed s is always the same.

    Args:
        batch_size: pictures per batch.
        batches: batches per epoch.
        text_share: share of the pictures that show words, the others show compositions.
        drop_text: share of texts replaced by "", so that guidance has something to compare with.
        seed: of prompts and places.
    """

    batch_size: int
    batches: int
    text_share: float
    drop_text: float
    seed: int

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[tuple[Tensor, list[str]]]:
        for index in range(self.batches):
            yield self.batch(self.seed * self.batches + index)

    def batch(self, seed: int) -> tuple[Tensor, list[str]]:
        """Images (B, 3, 32, 32) in [0, 1] and the B texts they show."""
        words = round(self.text_share * self.batch_size)
        prompts = TilesPrompts("composition").draw(self.batch_size - words, seed) + TilesPrompts("text").draw(
            words, seed
        )
        dropped = torch.rand(len(prompts), generator=torch.Generator().manual_seed(seed)) < self.drop_text
        texts = ["" if drop else prompt.text for drop, prompt in zip(dropped.tolist(), prompts, strict=True)]
        return render(prompts, seed), texts


@dataclass(frozen=True)
class HeldOut:
    """One batch of ``count`` held-out texts per task."""

    count: int

    def __len__(self) -> int:
        return len(TASKS)

    def __iter__(self) -> Iterator[list[str]]:
        for task in TASKS:
            yield [prompt.text for prompt in TilesPrompts(task, "test").draw(self.count, seed=1)]


class RenderedPairs(LightningDataModule):
    """Rendered (picture, text) pairs to train on, held-out texts to draw in validation.

    Args:
        batch_size: pictures per update.
        batches: updates per epoch.
        text_share: share of the pictures that show words, which take longer to learn than compositions.
        drop_text: share of texts replaced by "".
        held_out: held-out texts per task and validation.
        seed: of prompts and places.
    """

    def __init__(
        self,
        batch_size: int = 64,
        batches: int = 100,
        text_share: float = 0.7,
        drop_text: float = 0.1,
        held_out: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__()
        at_least(1, batch_size=batch_size, batches=batches, held_out=held_out)
        within(0.0, 1.0, text_share=text_share, drop_text=drop_text)
        at_least(0, seed=seed)
        self.batch_size = batch_size
        self.batches = batches
        self.text_share = text_share
        self.drop_text = drop_text
        self.held_out = held_out
        self.seed = seed

    def train_dataloader(self) -> Pairs:
        """One epoch of pairs; every epoch, and every rank, sees others (needs reload_dataloaders_every_n_epochs=1)."""
        trainer = self.trainer
        epoch, rank, ranks = (trainer.current_epoch, trainer.global_rank, trainer.world_size) if trainer else (0, 0, 1)
        seed = (self.seed * 10_000 + epoch) * ranks + rank
        return Pairs(self.batch_size, self.batches, self.text_share, self.drop_text, seed)

    def val_dataloader(self) -> HeldOut:
        """The held-out texts to draw."""
        return HeldOut(self.held_out)


class Pretrain(LightningModule):
    """Flow matching of the transformer and both text encoders; the autoencoder is frozen.

    L = mean |v(x_σ, σ, text) - (noise - clean)|²,  σ = sigmoid(m + s · n),  n ~ N(0, 1).

    Args:
        pipeline: folder to start from, as ``python -m flowopd.tiles.build autoencoder`` writes it.
        out: where the trained pipeline is saved, in float16.
        lr: peak learning rate of AdamW, reached after ``warmup`` updates and followed by a cosine to 0.
        warmup: share of the updates spent warming up.
        sigma_mean: m, where training noise levels centre, in logits.
        sigma_std: s, how widely they spread, in logits.
        num_steps: Euler steps of the pictures drawn in validation.
    """

    def __init__(
        self,
        pipeline: Path,
        out: Path,
        lr: float = 1.5e-3,
        warmup: float = 0.05,
        sigma_mean: float = 0.3,
        sigma_std: float = 1.2,
        num_steps: int = 10,
    ) -> None:
        super().__init__()
        above(0.0, lr=lr)
        within(0.0, 1.0, warmup=warmup)
        within(-10.0, 10.0, sigma_mean=sigma_mean)
        within(0.0, 10.0, sigma_std=sigma_std)
        within(1, 1000, num_steps=num_steps)
        self.pipe = load(pipeline)
        self.transformer = self.pipe.transformer
        self.text_encoder = self.pipe.text_encoder
        self.text_encoder_2 = self.pipe.text_encoder_2
        self.vae = self.pipe.vae.requires_grad_(False)
        self.train()  # nothing here drops out; lightning warns of parts left in eval mode
        self.out = out
        self.lr = lr
        self.warmup = warmup
        self.sigma_mean = sigma_mean
        self.sigma_std = sigma_std
        self.num_steps = num_steps

    def training_step(self, batch: tuple[Tensor, list[str]], batch_idx: int) -> Tensor:
        """One batch of flow matching."""
        images, texts = batch
        clean = self.encode(images)
        noise = torch.randn_like(clean)
        sigma = torch.sigmoid(self.sigma_mean + self.sigma_std * torch.randn(len(clean), device=self.device))
        velocity = self.velocity(interpolate(clean, noise, sigma), sigma, texts)
        loss = F.mse_loss(velocity, noise - clean)
        self.log("pretrain/loss", loss, prog_bar=True, on_step=False, on_epoch=True, batch_size=len(images))
        return loss

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, 32, 32) in [0, 1] → latents (B, 4, 8, 8) of mean 0 and deviation 1."""
        latents: Tensor = self.vae.encode(2 * images - 1).latent_dist.mode()
        shift, scale = self.vae.config.shift_factor, self.vae.config.scaling_factor
        return latents.sub(shift).mul(scale)

    def velocity(self, x: Tensor, sigma: Tensor, texts: list[str]) -> Tensor:
        """The velocity the stock pipeline would follow; gradient reaches the text encoders through its own encoder."""
        tokens, _, pooled, _ = self.pipe.encode_prompt(
            texts, texts, texts, device=self.device, do_classifier_free_guidance=False, max_sequence_length=0
        )
        velocity: Tensor = self.transformer(x, tokens, pooled, 1000 * sigma, return_dict=False)[0]
        return velocity

    def validation_step(self, texts: list[str], batch_idx: int) -> None:
        """Draw held-out texts and log their mean rewards."""
        prompts = [parse(text) for text in texts]
        images = paint(self.pipe, texts, self.num_steps, seed=0)
        task = TASKS[batch_idx]
        reward = REWARDS[task]
        rewards = {task: reward(), f"{task}_strict": reward(strict=True), f"{task}_crispness": Crispness()}
        scores = {f"eval/{name}": reward.score(images, prompts).mean() for name, reward in rewards.items()}
        self.log_dict(scores, batch_size=len(texts), sync_dist=True, prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW; linear warm-up, then cosine to zero at the last update."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=self.lr, weight_decay=0.01, betas=(0.9, 0.99))
        updates = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.lr, total_steps=updates, pct_start=self.warmup, cycle_momentum=False
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_end(self) -> None:
        """Save the stock pipeline folder."""
        if self.trainer.is_global_zero:
            deepcopy(self.pipe).to(torch.float16).save_pretrained(self.out)
