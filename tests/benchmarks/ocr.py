"""What the OCR reward reads of rendered texts, and how long it takes: ``python tests/benchmarks/ocr.py [workers]``."""

import sys
import time
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

from flowopd.prompts import OCRPrompts
from flowopd.records import Prompt

SIZE = 512
STYLES = ("plain", "coloured and rotated", "noisy")


def rendered(style: str, prompts: Sequence[Prompt]) -> Tensor:
    """The target of each prompt, written in a style, (B, 3, 512, 512) uint8."""
    dice = np.random.default_rng(0)
    pictures = [picture(style, prompt.metadata["target"], dice) for prompt in prompts]
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)


def picture(style: str, text: str, dice: np.random.Generator) -> Image.Image:
    if style == "plain":
        return written(text, Image.new("RGB", (SIZE, SIZE), "white"), "black")
    if style == "coloured and rotated":
        sky = np.linspace((250, 200, 120), (255, 250, 235), SIZE).astype(np.uint8)
        ground = Image.fromarray(np.repeat(sky[:, None], SIZE, axis=1))
        return written(text, ground, "darkblue", angle=float(dice.choice((-8, 8))))
    noise = dice.integers(60, 200, (SIZE, SIZE, 3), dtype=np.uint8)
    ground = Image.fromarray(noise)
    return written(text, ground, "white", stroke=3).filter(ImageFilter.GaussianBlur(1.2))


def written(text: str, ground: Image.Image, colour: str, angle: float = 0, stroke: int = 0) -> Image.Image:
    """Write a text across the middle, as large as fits."""
    font = max((f for f in fonts() if f.getlength(text) < 0.85 * SIZE), key=lambda font: font.size)
    layer = Image.new("RGBA", ground.size, (0, 0, 0, 0))
    place = (SIZE / 2, SIZE / 2)
    ImageDraw.Draw(layer).text(
        place, text, colour, font, anchor="mm", stroke_width=stroke, stroke_fill="black" if stroke else None
    )
    layer = layer.rotate(angle, Image.Resampling.BICUBIC)
    ground.paste(layer, mask=layer)
    return ground


def fonts() -> list[ImageFont.FreeTypeFont]:
    return [ImageFont.load_default(size) for size in (20, 24, 28, 34, 40, 48, 56, 64)]


def main() -> None:
    from flowopd.rewards import OCR

    reward = OCR(workers=int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    prompts = OCRPrompts("test").draw(24, seed=0)
    reward.detail(rendered("plain", prompts[:8]), prompts[:8])  # engines are built
    for style in STYLES:
        images = rendered(style, prompts)
        start, busy = time.perf_counter(), time.process_time()
        scores = reward.detail(images, prompts)
        spent, busy = (1000 * t / len(images) for t in (time.perf_counter() - start, time.process_time() - busy))
        exact, mean = float(scores.parts["exact"].mean()), float(scores.value.mean())
        print(
            f"{style:>20}: {exact:6.1%} exact, score {mean:.3f}, {spent:.0f} ms per image ({busy:.0f} ms of CPU here)"
        )
    reward.close()


if __name__ == "__main__":
    main()
