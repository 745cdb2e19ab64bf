"""The laws of the tiles world: language, pictures, exact rewards, and the shipped base."""

import itertools

import pytest
import torch

from flowopd.prompts import PromptSource
from flowopd.records import Prompt
from flowopd.rewards import Reward
from flowopd.tiles import Composition, Crispness, Text, TilesPrompts, asset, parse, render
from flowopd.tiles.glyphs import GLYPHS, LETTERS, PALETTE, SPRITES, UNKNOWN, bitmaps, code, cut, draw
from flowopd.tiles.rewards import edit_distance, read, trim

TASKS = {"composition": Composition, "text": Text}
SPLITS = ("train", "test")
TASK_SPLITS = list(itertools.product(TASKS, SPLITS))


def picture(**glyphs: str) -> torch.Tensor:
    """One image from tiles written as ``t5="red circle"``."""
    codes = torch.zeros(1, 16, dtype=torch.long)
    for place, glyph in glyphs.items():
        codes[0, int(place[1:])] = code(*glyph.split())
    return draw(codes)


def word(text: str, colour: str = "red", start: int = 4) -> torch.Tensor:
    return picture(**{f"t{start + i}": f"{colour} {letter}" for i, letter in enumerate(text) if letter != " "})


# ---------------------------------------------------------------------------------------------------------- pictures


def test_any_two_glyphs_differ_in_at_least_eight_pixels():
    ink = bitmaps().flatten(1).float()
    apart = torch.cdist(ink, ink, p=1) + 64 * torch.eye(len(GLYPHS))
    assert apart.min() >= 8


def test_cutting_a_drawn_canvas_gives_its_sprites():
    codes = torch.randint(len(SPRITES), (5, 16), generator=torch.Generator().manual_seed(0))
    assert torch.equal(cut(draw(codes)), SPRITES[codes])


def test_reading_inverts_drawing_for_every_code():
    codes = torch.arange(80).view(5, 16) % len(SPRITES)
    assert torch.equal(read(draw(codes)), codes)


def test_a_tile_of_noise_is_unknown():
    assert (read(torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))) == UNKNOWN).all()


# ---------------------------------------------------------------------------------------------------------- language


@pytest.mark.parametrize(("task", "split"), TASK_SPLITS)
def test_a_rendered_prompt_scores_one(task, split):
    prompts = TilesPrompts(task, split).draw(256, seed=3)
    images = render(prompts, seed=4)
    for reward in (TASKS[task](), TASKS[task](strict=True), Crispness()):
        assert torch.equal(reward.score(images, prompts), torch.ones(256))


@pytest.mark.parametrize(("task", "split"), TASK_SPLITS)
def test_the_same_seed_draws_the_same_prompts(task, split):
    source = TilesPrompts(task, split)
    assert isinstance(source, PromptSource)
    assert source.draw(20, seed=5) == source.draw(20, seed=5)
    assert source.draw(20, seed=5) != source.draw(20, seed=6)


@pytest.mark.parametrize("task", TASKS)
def test_train_and_test_never_meet(task):
    train, test = ({prompt.text for prompt in TilesPrompts(task, split).draw(3000, seed=0)} for split in SPLITS)
    assert not train & test
    assert len(test) > 200


def test_swapped_clauses_stay_in_one_split():
    test = {prompt.text for prompt in TilesPrompts("composition", "test").draw(500, seed=0)}
    train = {prompt.text for prompt in TilesPrompts("composition", "train").draw(3000, seed=0)}
    assert not {" and ".join(reversed(text.split(" and "))) for text in test} & train


@pytest.mark.parametrize("task", TASKS)
def test_parsing_a_drawn_text_gives_the_drawn_prompt(task):
    for prompt in TilesPrompts(task).draw(50, seed=0):
        assert parse(prompt.text) == prompt
        assert prompt.task == task


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("two purple circle and one red square", "'purple' is not a colour of the tiles world"),
        ("five red circle and one blue square", "'five' is not a number of the tiles world"),
        ("two red star and one blue square", "'star' is not a shape of the tiles world"),
        ("two red circle and one red square", "two clauses of different colours"),
        ("two red circle", "two clauses of different colours"),
        ('text red "KAHB"', "'B' is not a letter of the tiles world"),
        ('text red "KA"', "has 2 letters"),
        ("text red KAHO", "is not a text prompt"),
        ("a cat on a mat", "is not a clause"),
        ("", "is not a clause"),
    ],
)
def test_unknown_words_are_named(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        parse(text)


def test_an_unknown_task_or_split_is_refused():
    with pytest.raises(ValueError, match="'poetry'"):
        TilesPrompts("poetry")
    with pytest.raises(ValueError, match="'dev'"):
        TilesPrompts("text", "dev")


# ----------------------------------------------------------------------------------------------------------- rewards


@pytest.mark.parametrize("task", TASKS)
def test_strict_is_never_above_partial(task):
    prompts = TilesPrompts(task).draw(256, seed=0)
    images = (render(prompts, 0) + 0.2 * torch.randn(256, 3, 32, 32, generator=torch.manual_seed(0))).clamp(0, 1)
    partial, strict = (TASKS[task](strict).score(images, prompts) for strict in (False, True))
    assert (strict <= partial).all()
    assert ((partial >= 0) & (partial <= 1)).all()
    assert 0 < partial.mean() < 1


TWO_AND_ONE = "two red circle and one blue square"


@pytest.mark.parametrize(
    ("tiles", "score"),
    [
        ({"t0": "red circle", "t9": "red circle", "t3": "blue square"}, 1.0),
        ({"t0": "red circle", "t3": "blue square"}, 2 / 3),
        ({"t0": "red circle", "t9": "green circle", "t3": "blue square"}, 2 / 3),
        ({"t0": "red circle", "t9": "red circle", "t3": "blue square", "t4": "red A"}, 3 / 4),
        ({f"t{i}": "red circle" for i in range(16)}, 2 / 16),
        ({}, 0.0),
    ],
)
def test_composition_is_the_overlap_of_counts(tiles, score):
    images, prompts = picture(**tiles), [parse(TWO_AND_ONE)]
    assert Composition().score(images, prompts).item() == pytest.approx(score)
    assert Composition(strict=True).score(images, prompts).item() == float(score == 1)


@pytest.mark.parametrize(
    ("image", "score"),
    [
        (word("KAHO"), 1.0),
        (word("KAHO", start=12), 1.0),
        (word("KAHZ"), 3 / 4),
        (word("KAH"), 3 / 4),
        (word("KAO"), 3 / 4),
        (word("K HO"), 3 / 4),
        (word("KHAO"), 2 / 4),
        (word("KAHO", "blue"), 0.0),
        (word("KAHO") + picture(t15="red K") - picture(), 3 / 4),
        (word("KAHO") + word("KAHO", start=8) - picture(), 0.0),
        (picture(), 0.0),
    ],
)
def test_text_is_one_minus_edits_and_strays_over_length(image, score):
    prompts = [parse('text red "KAHO"')]
    assert Text().score(image, prompts).item() == pytest.approx(score)
    assert Text(strict=True).score(image, prompts).item() == float(score == 1)


def test_edit_distance_agrees_with_torchmetrics():
    from torchmetrics.functional.text import edit_distance as known

    dice = torch.Generator().manual_seed(0)
    left, right = (torch.randint(13, (200, 4), generator=dice).sort(dim=1, descending=True).values for _ in range(2))
    lengths = [(side != 0).sum(dim=1) for side in (left, right)]
    ours = edit_distance(left, lengths[0], right, lengths[1])
    words = [["".join(LETTERS[i - 1] for i in row if i) for row in side.tolist()] for side in (left, right)]
    theirs = known(words[0], words[1], reduction="none")
    assert ours.tolist() == theirs.tolist()


def test_trimming_moves_to_the_left_and_closes_gaps():
    rows, lengths = trim(torch.tensor([[0, 5, 0, 7], [0, 0, 0, 0], [1, 2, 0, 0]]))
    assert rows.tolist() == [[5, 13, 7, 0], [0, 0, 0, 0], [1, 2, 0, 0]]
    assert lengths.tolist() == [3, 0, 2]


def test_crispness_falls_with_the_distance_to_the_palette():
    gray = PALETTE[0, :, None, None].expand(1, 3, 32, 32) - 0.1 / 3**0.5
    assert Crispness().score(gray, [Prompt("anything", "drawbench")]).item() == pytest.approx(torch.e**-1, abs=1e-4)


@pytest.mark.parametrize("reward", [Composition(), Text(), Crispness()])
def test_rewards_keep_the_protocol(reward):
    task = "text" if isinstance(reward, Text) else "composition"
    prompts = TilesPrompts(task).draw(3, seed=0)
    images = render(prompts, seed=0)
    images[0, 0, 0, 0] = float("nan")
    images[1, 0, 0, 0] = float("inf")
    scores = reward.score(images, prompts)
    assert isinstance(reward, Reward)
    assert scores.dtype == torch.float32
    assert scores.tolist() == [0, 0, 1]
    with pytest.raises(ValueError, match=r"\(3, 3, 32, 32\).*got \(3, 3, 16, 16\)"):
        reward.score(images[..., :16, :16], prompts)
    assert reward.score(images[:0], []).shape == (0,)


def test_a_prompt_of_another_task_is_refused():
    with pytest.raises(ValueError, match="expected composition prompts, got the text prompt"):
        Composition().score(word("KAHO"), [parse('text red "KAHO"')])


# ---------------------------------------------------------------------------------------------------------- the base


def every_word():
    from flowopd.tiles.glyphs import COLOURS, SHAPES
    from flowopd.tiles.world import NUMBERS

    return [*NUMBERS, *COLOURS, *SHAPES, "and", "text"]


def test_a_word_is_one_token_and_letters_stay_single():
    from flowopd.tiles.build import tokenizer

    words = tokenizer()
    assert all(words.tokenize(word) == [word + "</w>"] for word in every_word())
    for pair in itertools.product(LETTERS.lower(), repeat=2):
        assert words.tokenize("".join(pair)) == [pair[0], pair[1] + "</w>"]
    assert words.tokenize('text red "KAHO"') == ["text</w>", "red</w>", '"</w>', "k", "a", "h", "o</w>", '"</w>']


@pytest.mark.parametrize("task", TASKS)
def test_every_prompt_fits_the_text_encoders(task):
    from flowopd.tiles.build import PROMPT_LENGTH, tokenizer

    texts = [prompt.text for prompt in TilesPrompts(task).draw(500, seed=0)]
    assert max(len(ids) for ids in tokenizer()(texts).input_ids) <= PROMPT_LENGTH


@pytest.fixture(scope="module")
def base():
    from flowopd.tiles.build import load

    return load(asset("base"))


def test_the_shipped_tokenizers_are_those_we_build(base):
    from flowopd.tiles.build import tokenizer

    for shipped in (base.tokenizer, base.tokenizer_2):
        assert shipped.get_vocab() == tokenizer().get_vocab()
        assert shipped.model_max_length == tokenizer().model_max_length


def test_rendered_pictures_survive_the_autoencoder(base):
    from flowopd.tiles.build import reconstruction_scores

    scores = reconstruction_scores(base.vae)
    assert scores["composition"] == scores["text"] == 1
    assert scores["composition/crispness"] > 0.9
    assert scores["text/crispness"] > 0.9


def test_latents_have_mean_zero_and_deviation_one(base):
    prompts = [prompt for task in TASKS for prompt in TilesPrompts(task).draw(128, seed=9)]
    with torch.no_grad():
        latents = base.vae.encode(2 * render(prompts, seed=9) - 1).latent_dist.mode()
    latents = (latents - base.vae.config.shift_factor) * base.vae.config.scaling_factor
    assert abs(latents.mean()) < 0.05
    assert abs(latents.std() - 1) < 0.05


def test_the_stock_pipeline_draws_well_but_not_too_well(base):
    from flowopd.tiles.build import drawing_scores

    scores = drawing_scores(base, count=128, num_steps=10, seed=0)
    assert 0.5 < scores["composition"] < 0.8
    assert 0.25 < scores["text"] < 0.55
    assert scores["composition/crispness"] > 0.55
    assert scores["composition/strict"] > 0


def test_the_base_is_small():
    files = [path for path in asset("base").rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in files) < 4_000_000
    assert sum(path.stat().st_size for path in files) < 5_000_000


def test_an_asset_that_is_not_shipped_is_named():
    with pytest.raises(FileNotFoundError, match=r"ships no 'teapot'; it ships: .*base"):
        asset("teapot")


def test_pretraining_goes_on_from_a_pipeline_and_saves_one(tmp_path):
    import lightning.pytorch as lightning

    from flowopd.tiles.build import load
    from flowopd.training.pretrain import Pretrain, RenderedPairs

    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Pretrain(asset("base"), tmp_path / "base", lr=1e-6, num_steps=2)
    trainer.fit(module, RenderedPairs(batch_size=8, batches=2, held_out=2))
    assert trainer.callback_metrics["pretrain/loss"] < 1.2
    assert {"eval/composition", "eval/text_strict"} <= trainer.callback_metrics.keys()
    before, after = (load(folder).transformer.proj_out.weight for folder in (asset("base"), tmp_path / "base"))
    torch.testing.assert_close(before, after, atol=1e-4, rtol=1e-2)


def test_training_conditioning_is_what_the_pipeline_encodes_and_carries_gradient():
    from flowopd.training.pretrain import Pretrain

    module = Pretrain(asset("base"), asset("base"))
    x = torch.randn(2, 4, 8, 8)
    module.velocity(x, torch.tensor([0.3, 0.9]), ['text red "KAHO"', ""]).sum().backward()
    assert module.text_encoder.text_model.embeddings.token_embedding.weight.grad.abs().sum() > 0
    assert module.text_encoder_2.text_projection.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in module.vae.parameters())
