"""What the tiles world is drawn with: a palette, sixteen glyphs, and canvases of 4 × 4 tiles.

A picture is a grid of *codes*: 0 is an empty tile, ``1 + 16 · colour + glyph`` is one glyph in one colour.
"""

import torch
from torch import Tensor

GRID = 4  # tiles per side
TILE = 8  # pixels per side of a tile
SIZE = GRID * TILE

COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "triangle", "diamond")
LETTERS = "AEHIKLMOPUXZ"
GLYPHS = (*SHAPES, *LETTERS)

# Background first. Any two are at least 0.66 apart in RGB, so a nearest colour is never in doubt.
PALETTE = torch.tensor(
    [[0.97, 0.97, 0.97], [0.85, 0.10, 0.10], [0.05, 0.60, 0.15], [0.10, 0.20, 0.90], [0.95, 0.75, 0.0]]
)

_ROWS = {  # 7 × 7 bitmaps, "/" ends a row; any two differ in at least 8 pixels
    "circle": "..###../.#####./#######/#######/#######/.#####./..###..",
    "square": "#######/#######/#######/#######/#######/#######/#######",
    "triangle": "...#.../...#.../..###../..###../.#####./.#####./#######",
    "diamond": "...#.../..###../.#####./#######/.#####./..###../...#...",
    "A": "..###../.#####./##...##/#######/##...##/##...##/##...##",
    "E": "#######/##...../##...../######./##...../##...../#######",
    "H": "##...##/##...##/##...##/#######/##...##/##...##/##...##",
    "I": ".#####./..###../..###../..###../..###../..###../.#####.",
    "K": "##...##/##..##./##.##../####.../##.##../##..##./##...##",
    "L": "##...../##...../##...../##...../##...../#######/#######",
    "M": "#.....#/##...##/#######/#######/#.###.#/#..#..#/#.....#",
    "O": ".#####./#######/##...##/##...##/##...##/#######/.#####.",
    "P": "######./##...##/##...##/######./##...../##...../##.....",
    "U": "##...##/##...##/##...##/##...##/##...##/#######/.#####.",
    "X": "##...##/###.###/.#####./..###../.#####./###.###/##...##",
    "Z": "#######/....##./...##../..##.../.##..../##...../#######",
}


def bitmaps() -> Tensor:
    """Every glyph in the upper left of its tile, (16, 8, 8) bool; the last row and column keep neighbours apart."""
    ink = torch.zeros(len(GLYPHS), TILE, TILE, dtype=torch.bool)
    for index, name in enumerate(GLYPHS):
        rows = _ROWS[name].split("/")
        ink[index, : len(rows), : len(rows[0])] = torch.tensor([[pixel == "#" for pixel in row] for row in rows])
    return ink


def sprites() -> Tensor:
    """What each code looks like, (65, 3, 8, 8) in [0, 1]."""
    ink = bitmaps()[None, :, None]
    coloured = torch.where(ink, PALETTE[1:, None, :, None, None], PALETTE[0, :, None, None])
    empty = PALETTE[0, :, None, None].expand(1, 3, TILE, TILE)
    return torch.cat([empty, coloured.flatten(0, 1)])


SPRITES = sprites()
UNKNOWN = len(SPRITES)  # the code of a tile that shows nothing of the world


def code(colour: str, glyph: str) -> int:
    """The code of one glyph in one colour."""
    return 1 + len(GLYPHS) * COLOURS.index(colour) + GLYPHS.index(glyph)


def draw(codes: Tensor) -> Tensor:
    """Paint grids of codes without anti-aliasing.

    Args:
        codes: (B, 16) long, row by row.

    Returns:
        (B, 3, 32, 32) images in [0, 1].
    """
    tiles = SPRITES[codes].view(-1, GRID, GRID, 3, TILE, TILE)
    return tiles.permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, SIZE, SIZE)


def cut(images: Tensor) -> Tensor:
    """Cut images into tiles, the inverse of the last step of ``draw``: (B, 3, 32, 32) → (B, 16, 3, 8, 8)."""
    tiles = images.reshape(-1, 3, GRID, TILE, GRID, TILE).permute(0, 2, 4, 1, 3, 5)
    return tiles.reshape(-1, GRID * GRID, 3, TILE, TILE)
