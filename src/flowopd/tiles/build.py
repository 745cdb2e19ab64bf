"""Make the pipeline folder of the tiles world: tokenizers, tiny models, a trained autoencoder.

python -m flowopd.tiles.build autoencoder --out runs/tiles/untrained    # about six minutes on two cores
python -m flowopd.tiles.build score --folder src/flowopd/tiles/assets/base
"""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from jsonargparse import auto_cli
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from flowopd.core.ranges import at_least
from flowopd.tiles.glyphs import COLOURS, GRID, SHAPES, SIZE, SPRITES, draw
from flowopd.tiles.rewards import Composition, Crispness, Text
from flowopd.tiles.world import NUMBERS, TASKS, Task, TilesPrompts, render

PROMPT_LENGTH = 12  # tokens: 'text red "KAHO"' is 2 words, 2 quotes, 4 letters, begin and end

REWARDS: dict[Task, type[Composition | Text]] = {"composition": Composition, "text": Text}


def merges(word: str) -> list[tuple[str, str]]:
    """Byte-pair merges that build a word from left to right: t+w, tw+o</w>.

    No word of the world begins with two letters of ``LETTERS``, so no first merge ever joins two letters to be drawn.
    """
    pieces = [*word[:-1], word[-1] + "</w>"]
    return [("".join(pieces[:i]), pieces[i]) for i in range(1, len(pieces))]


def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that reads each word of the world as one token and letters one by one."""
    words = sorted({*NUMBERS, *COLOURS, *SHAPES, "and", "text"}, key=lambda word: (-len(word), word))
    rules = list(dict.fromkeys(rule for word in words for rule in merges(word)))
    letters = [chr(i) for i in range(33, 127)]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(rule) for rule in rules)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=rules,
        model_max_length=PROMPT_LENGTH,
        pad_token="<|endoftext|>",
    )


def text_encoder(words: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """Two layers: SD3 reads ``hidden_states[-2]``, where each word has heard the words before it once."""
    config = CLIPTextConfig(
        vocab_size=len(words),
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        hidden_size=64,
        intermediate_size=128,
        projection_dim=64,
        num_attention_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=PROMPT_LENGTH,
    )
    return CLIPTextModelWithProjection(config)


def transformer() -> SD3Transformer2DModel:
    """The velocity network, 1.7 M parameters; a patch of 2 × 2 latents is one tile."""
    return SD3Transformer2DModel(
        sample_size=2 * GRID,
        pos_embed_max_size=2 * GRID,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        num_attention_heads=4,
        attention_head_dim=32,
        joint_attention_dim=128,
        caption_projection_dim=128,
        pooled_projection_dim=128,
        qk_norm="rms_norm",
    )


def vae() -> AutoencoderKL:
    """The untrained autoencoder, (3, 32, 32) ↔ (4, 8, 8), 234 k parameters."""
    return AutoencoderKL(
        sample_size=SIZE,
        latent_channels=4,
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def pipeline(autoencoder: AutoencoderKL) -> StableDiffusion3Pipeline:
    """A stock pipeline around an autoencoder; everything else is untrained."""
    words = (tokenizer(), tokenizer())
    return StableDiffusion3Pipeline(
        transformer=transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=autoencoder,
        text_encoder=text_encoder(words[0]),
        tokenizer=words[0],
        text_encoder_2=text_encoder(words[1]),
        tokenizer_2=words[1],
        text_encoder_3=None,
        tokenizer_3=None,
    )


def scatter(count: int, generator: torch.Generator) -> Tensor:
    """Canvases of random glyphs, each tile empty half of the time: (count, 3, 32, 32) in [0, 1]."""
    codes = torch.randint(1, len(SPRITES), (count, GRID * GRID), generator=generator)
    return draw(codes * torch.randint(2, codes.shape, generator=generator))


def reconstruction_loss(model: AutoencoderKL, images: Tensor) -> Tensor:
    """L = L1 + 2 · MSE + 1e-5 · KL,  pixels in [-1, 1] averaged, KL in nats per image."""
    posterior = model.encode(2 * images - 1).latent_dist
    error: Tensor = model.decode(posterior.sample()).sample - (2 * images - 1)
    rate: Tensor = posterior.kl().mean()
    return error.abs().mean() + 2 * error.square().mean() + 1e-5 * rate


def train(model: AutoencoderKL, updates: int, seed: int) -> None:
    """Fit the autoencoder to random canvases: AdamW 4e-3 with cosine decay, batches of 24."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=updates, pct_start=0.05)
    for _ in (progress := tqdm(range(updates), desc="autoencoder")):
        loss = reconstruction_loss(model, scatter(24, generator))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.4f}")


@torch.no_grad()
def standardise(model: AutoencoderKL) -> None:
    """Measure mean and deviation of latents, so that  (z - shift) · scale  has mean 0 and deviation 1."""
    prompts = [p for task in TASKS for p in TilesPrompts(task).draw(512, seed=0)]
    latents = model.encode(2 * render(prompts, seed=0) - 1).latent_dist.mode()
    model.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())


@torch.no_grad()
def reconstruction_scores(model: AutoencoderKL) -> dict[str, float]:
    """Mean rewards of encoded and decoded pictures; 1 is perfect."""
    scores: dict[str, float] = {}
    for task in TASKS:
        prompts = TilesPrompts(task, "test").draw(256, seed=1)
        latents = model.encode(2 * render(prompts, seed=1) - 1).latent_dist.mode()
        images = (model.decode(latents).sample / 2 + 0.5).clamp(0, 1)
        scores[task] = REWARDS[task](strict=True).score(images, prompts).mean().item()
        scores[f"{task}/crispness"] = Crispness().score(images, prompts).mean().item()
    return scores


def autoencoder(out: Path, updates: int = 2400, seed: int = 0) -> None:
    """Train the autoencoder and write the otherwise untrained pipeline.

    Args:
        out: folder to write.
        updates: optimiser updates, batches of 24 canvases.
        seed: of the initial weights and of the canvases.
    """
    at_least(1, updates=updates)
    at_least(0, seed=seed)
    torch.manual_seed(seed)
    model = vae()
    train(model, updates, seed)
    model.eval()
    standardise(model)
    pipeline(model).save_pretrained(out)
    print("reconstruction:", reconstruction_scores(model))


def score(folder: Path, count: int = 256, num_steps: int = 10, seed: int = 0) -> None:
    """Draw held-out prompts with a stock pipeline and print the mean rewards.

    Args:
        folder: pipeline to load.
        count: pictures per task.
        num_steps: Euler steps of a linear grid, σ = 1, 1 - 1/n, …, 1/n.
        seed: of prompts and of starting noise.
    """
    at_least(1, count=count, num_steps=num_steps)
    at_least(0, seed=seed)
    print(drawing_scores(load(folder), count, num_steps, seed))


def load(folder: Path) -> StableDiffusion3Pipeline:
    """Load a pipeline of the tiles world in float32; diffusers wants the two missing T5 parts spelled out."""
    return StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None, dtype=torch.float32)


def paint(pipe: StableDiffusion3Pipeline, texts: list[str], num_steps: int, seed: int) -> Tensor:
    """Draw texts without guidance on a linear grid: (B, 3, 32, 32) in [0, 1]."""
    pipe.set_progress_bar_config(disable=True)
    images: Tensor = pipe(
        texts,
        sigmas=[1 - i / num_steps for i in range(num_steps)],
        guidance_scale=1.0,
        max_sequence_length=0,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    ).images
    return images


def drawing_scores(pipe: StableDiffusion3Pipeline, count: int, num_steps: int, seed: int) -> dict[str, float]:
    """Mean rewards on held-out prompts, strict ones too, named ``task/reward``."""
    scores: dict[str, float] = {}
    for task in TASKS:
        prompts = TilesPrompts(task, "test").draw(count, seed)
        images = paint(pipe, [prompt.text for prompt in prompts], num_steps, seed)
        scores[task] = REWARDS[task]().score(images, prompts).mean().item()
        scores[f"{task}/strict"] = REWARDS[task](strict=True).score(images, prompts).mean().item()
        scores[f"{task}/crispness"] = Crispness().score(images, prompts).mean().item()
    return scores


if __name__ == "__main__":
    auto_cli([autoencoder, score], as_positional=False)
