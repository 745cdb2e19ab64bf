"""Exact rewards of the tiles world: a picture is read tile by tile and compared with what was asked."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from flowopd.records import Prompt
from flowopd.tiles.glyphs import (
    COLOURS,
    GLYPHS,
    GRID,
    LETTERS,
    PALETTE,
    SHAPES,
    SIZE,
    SPRITES,
    TILE,
    UNKNOWN,
    code,
    cut,
)
from flowopd.tiles.world import parse

# Mean squared RGB distance per pixel beyond which a tile shows nothing of the world. Two glyphs of one colour
# differ in 8 or more of 64 pixels, about 0.15, so a tile half way between two is still below it.
REJECT = 0.08
# Letters as read in a row; 0 is an empty tile, OTHER any glyph that is not a letter of the asked colour.
OTHER = len(LETTERS) + 1


def read(images: Tensor) -> Tensor:
    """Nearest code of every tile, ``UNKNOWN`` where none is near.

    Args:
        images: (B, 3, 32, 32) in [0, 1].

    Returns:
        (B, 16) long.
    """
    tiles = cut(images.float().nan_to_num()).flatten(0, 1).flatten(1)
    distance, codes = torch.cdist(tiles, SPRITES.to(tiles).flatten(1)).min(dim=-1)
    return codes.masked_fill(distance.square() > REJECT * TILE * TILE, UNKNOWN).view(-1, GRID * GRID)


def _checked(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    if images.shape[1:] != (3, SIZE, SIZE) or len(images) != len(prompts):
        expected = (len(prompts), 3, SIZE, SIZE)
        raise ValueError(f"expected images of shape {expected}, one per prompt, got {tuple(images.shape)}")
    return images


def _asked(prompts: Sequence[Prompt], task: str) -> list[Prompt]:
    asked = [parse(prompt.text) for prompt in prompts]
    for prompt in asked:
        if prompt.task != task:
            raise ValueError(f"expected {task} prompts, got the {prompt.task} prompt {prompt.text!r}")
    return asked


def _finite(scores: Tensor, images: Tensor) -> Tensor:
    """A picture with a NaN or an infinity scores 0."""
    return scores.where(images.flatten(1).isfinite().all(dim=1), 0.0)


class Composition:
    """How well the counts of glyphs agree,  r = Σ_g min(found_g, asked_g) / max(Σ_g found_g, Σ_g asked_g).

    g runs over glyphs in a colour; a tile that shows something unknown is found and was never asked for.

    Args:
        strict: 1 for the exact picture, else 0.
    """

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score each image against its prompt: (B,) in [0, 1]."""
        codes = read(_checked(images, prompts))
        found = F.one_hot(codes, UNKNOWN + 1).sum(dim=1)[:, 1:]
        asked = self.asked(prompts).to(found)
        overlap = torch.minimum(found, asked).sum(dim=1) / torch.maximum(found.sum(dim=1), asked.sum(dim=1))
        return _finite((overlap == 1).float() if self.strict else overlap, images)

    def asked(self, prompts: Sequence[Prompt]) -> Tensor:
        """How many of each code the prompts ask for, (B, 65) long; the last column, unknown, is 0."""
        counts = torch.zeros(len(prompts), UNKNOWN, dtype=torch.long)
        for row, prompt in zip(counts, _asked(prompts, "composition"), strict=True):
            for count, colour, shape in prompt.metadata["clauses"]:
                row[code(colour, shape) - 1] += count
        return counts


class Text:
    """How well the asked word can be read,  r = max(0, 1 - (edits + strays) / length),  in the best of the four rows.

    A row is read from its first glyph to its last; whatever is not a letter of the asked colour, a gap included, reads
    as a wrong letter. Every glyph outside the row is a stray.

    Args:
        strict: 1 for the exact word with nothing else drawn, else 0.
    """

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score each image against its prompt: (B,) in [0, 1]."""
        codes = read(_checked(images, prompts))
        words, colours = self.asked(prompts)
        rows, lengths = trim(letters(codes, colours.to(codes)).view(-1, GRID, GRID))
        drawn = (codes != 0).view(-1, GRID, GRID).sum(dim=2)
        strays = drawn.sum(dim=1, keepdim=True) - drawn
        words = words.to(codes)
        length = (words != 0).sum(dim=1)
        errors = edit_distance(rows, lengths, words[:, None].expand_as(rows), length[:, None]) + strays
        partial = (1 - errors.amin(dim=1) / length).clamp(min=0)
        return _finite((partial == 1).float() if self.strict else partial, images)

    def asked(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
        """Letters of the words, (B, 4) long, 0 after the end; and colours, (B,) long."""
        asked = [prompt.metadata for prompt in _asked(prompts, "text")]
        words = [[LETTERS.index(letter) + 1 for letter in target["word"]] for target in asked]
        words = [word + [0] * (GRID - len(word)) for word in words]
        return torch.tensor(words).view(-1, GRID), torch.tensor([COLOURS.index(t["colour"]) for t in asked])


def letters(codes: Tensor, colours: Tensor) -> Tensor:
    """Read codes as letters of a colour: (B, 16) in 0 (empty), 1 … 12, OTHER."""
    letter = (codes - 1) % len(GLYPHS) - len(SHAPES) + 1
    right = (codes != 0) & (codes != UNKNOWN) & ((codes - 1) // len(GLYPHS) == colours[:, None]) & (letter > 0)
    return torch.where(right, letter, OTHER * (codes != 0))


def trim(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Move each row to the left edge and close its ends; gaps inside become OTHER.

    Args:
        rows: (..., 4) long, 0 is empty.

    Returns:
        The rows, 0 after the end, and their lengths, (...).
    """
    place = torch.arange(GRID, device=rows.device)
    first = place.where(rows != 0, GRID).amin(dim=-1)
    lengths = (place.where(rows != 0, -1).amax(dim=-1) - first + 1).clamp(min=0)
    moved = rows.gather(-1, (place + first[..., None]).clamp(max=GRID - 1))
    inside = place < lengths[..., None]
    return torch.where(inside, torch.where(moved == 0, OTHER, moved), 0), lengths


def edit_distance(left: Tensor, left_length: Tensor, right: Tensor, right_length: Tensor) -> Tensor:
    """Levenshtein distance of many short words at once.

    d_ij = min(d_(i-1)j + 1, d_i(j-1) + 1, d_(i-1)(j-1) + [left_i ≠ right_j]), read at the two lengths.

    Args:
        left, right: (..., N) and (..., M) symbols.
        left_length, right_length: (...) how many of them count.

    Returns:
        (...) long.
    """
    table = left.new_zeros(*left.shape[:-1], left.shape[-1] + 1, right.shape[-1] + 1)
    table[..., :, 0] = torch.arange(table.shape[-2])
    table[..., 0, :] = torch.arange(table.shape[-1])
    for i in range(1, table.shape[-2]):
        for j in range(1, table.shape[-1]):
            skip = torch.minimum(table[..., i - 1, j], table[..., i, j - 1]) + 1
            swap = table[..., i - 1, j - 1] + (left[..., i - 1] != right[..., j - 1])
            table[..., i, j] = torch.minimum(skip, swap)
    flat = left_length * table.shape[-1] + right_length
    return table.flatten(-2).gather(-1, flat[..., None])[..., 0]


class Crispness:
    """How cleanly a picture is drawn,  r = exp(-mean distance of a pixel to its nearest palette colour / 0.1).

    Needs no prompt; distances are Euclidean in RGB.
    """

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score each image, whatever was asked: (B,) in [0, 1]."""
        pixels = _checked(images, prompts).float().nan_to_num().flatten(2)
        squares = torch.stack([(pixels - ink[:, None]).square().sum(dim=1) for ink in PALETTE.to(pixels)])
        distance = squares.amin(dim=0).sqrt()
        return _finite(torch.exp(-distance.mean(dim=1) / 0.1), images)
