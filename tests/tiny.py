"""A random Stable Diffusion 3 of 0.1 M parameters, adapters, prompts, rewards and trainers: all offline."""

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from lightning import Trainer
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from flowopd.models import LoRASpec, SD3Backbone
from flowopd.models.adapters.lora import ATTENTION
from flowopd.records import Prompt
from flowopd.rollouts import Sampler
from flowopd.training import SFT, ColdStart, FlowPolicy, RolloutDataModule

TOKENS = 16  # length of a prompt


def pipeline(seed: int = 0, t5: bool = True) -> StableDiffusion3Pipeline:
    """A stock pipeline of 16 × 16 pixels (latents 4 × 8 × 8) with random weights, two CLIPs and, or not, a T5."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        words, pieces = clip_tokenizer(), t5_tokenizer() if t5 else None
        return StableDiffusion3Pipeline(
            transformer=transformer(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae(),
            text_encoder=clip(words),
            tokenizer=words,
            text_encoder_2=clip(words),
            tokenizer_2=words,
            text_encoder_3=t5_encoder(pieces) if pieces else None,
            tokenizer_3=pieces,
        )


def transformer(**options) -> SD3Transformer2DModel:
    """Two joint blocks, the first with a second attention as in SD3.5 Medium."""
    shape = {
        "sample_size": 8,
        "pos_embed_max_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "joint_attention_dim": 32,  # T5's width, and that of both CLIPs together
        "caption_projection_dim": 16,
        "pooled_projection_dim": 32,
        "qk_norm": "rms_norm",
        "dual_attention_layers": (0,),
    }
    return SD3Transformer2DModel(**(shape | options))


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=16,
        latent_channels=4,
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0609,
        scaling_factor=1.5305,
    )


def clip(words: CLIPTokenizer) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(words),
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_attention_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=TOKENS,
    )
    return CLIPTextModelWithProjection(config)


def clip_tokenizer() -> CLIPTokenizer:
    """One token per character."""
    letters = [chr(i) for i in range(33, 127)]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TOKENS, pad_token="<|endoftext|>")


def t5_encoder(pieces: T5TokenizerFast) -> T5EncoderModel:
    config = T5Config(vocab_size=len(pieces), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return T5EncoderModel(config)


def t5_tokenizer() -> T5TokenizerFast:
    """One token per letter or digit."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=TOKENS)


def publish(folder: str | Path, cache: Path, name: str, revision: str = "main", commit: str = "a" * 40) -> Path:
    """Put a folder into a hub's cache, as if ``name`` had been downloaded at a branch, tag or commit."""
    model = cache / f"models--{name.replace('/', '--')}"
    (model / "refs").mkdir(parents=True, exist_ok=True)
    (model / "refs" / revision).write_text(commit)
    return Path(shutil.copytree(folder, model / "snapshots" / commit, dirs_exist_ok=True))


def stock_transformer(folder: str) -> SD3Transformer2DModel:
    return SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer").eval()


def expert(
    folder: Path, pipeline: str, seed: int = 1, rank: int = 4, alpha: int = 8, targets=ATTENTION, std=0.1, **options
) -> str:
    """Save a random adapter of the pipeline's transformer, by peft alone."""
    names = targets if isinstance(targets, str) else list(targets)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, **options)
    model = get_peft_model(stock_transformer(pipeline), config)
    noise = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data = std * torch.randn(parameter.shape, generator=noise)
    model.save_pretrained(str(folder))
    return str(folder)


@dataclass
class Words:
    """Prompts "red 0", "red 1", ... "red 999" of the task "red"; from "red 1000" on they are held out."""

    task: str
    first: int = 0

    def draw(self, count: int, seed: int) -> list[Prompt]:
        return [Prompt(f"{self.task} {self.first + (seed + i) % 1000}", self.task) for i in range(count)]

    def divided(self) -> tuple["Words", "Words"]:
        return self, Words(self.task, self.first + 1000)


@dataclass
class Brightness:
    """The mean of one colour channel."""

    channel: int = 0

    def score(self, images: Tensor, prompts: list[Prompt]) -> Tensor:
        return images[:, self.channel].mean((1, 2))


def backbone(path: str, **options) -> SD3Backbone:
    """A backbone in float32, not yet loaded."""
    return SD3Backbone(path, **({"dtype": "float32", "max_sequence_length": 8} | options))


def loaded(path: str, **options) -> SD3Backbone:
    ready = backbone(path, **options)
    ready.load()
    return ready


def policy(
    kind: type[FlowPolicy], path: str, objective=None, lr: float = 1e-2, steps: int = 4, **options
) -> FlowPolicy:
    """A policy of four steps, trained by plain gradient descent unless told otherwise."""
    defaults = {"sampler": Sampler(num_steps=steps), "lora": LoRASpec(rank=4, alpha=8)}
    defaults |= {"optimizer": partial(torch.optim.SGD, lr=lr)}
    return kind(backbone(path), objective, **(defaults | options))


def sft(path: str, draws: int = 2, lr: float = 1.0) -> ColdStart:
    """A cold start of four steps, trained by plain gradient descent."""
    options = {"sampler": Sampler(num_steps=4), "lora": LoRASpec(rank=4, alpha=8)}
    return ColdStart(backbone(path), SFT(draws), **options, optimizer=partial(torch.optim.SGD, lr=lr))


def data(*tasks: str, **options) -> RolloutDataModule:
    """Four prompts of two siblings in batches of four rows, unless told otherwise."""
    sizes = {"prompts_per_iteration": 4, "group_size": 2, "batch_size": 4, "evaluation_count": 3, "seed": 0}
    return RolloutDataModule({task: Words(task) for task in tasks or ("red",)}, **(sizes | options))


def trainer(folder: Path, callbacks=(), max_epochs: int = 1, **options) -> Trainer:
    """A quiet trainer on the CPU; one epoch is one rollout iteration."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    quiet |= {"enable_checkpointing": False, "limit_val_batches": 0}
    return Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        max_epochs=max_epochs,
        callbacks=list(callbacks),
        **(quiet | options),
    )
