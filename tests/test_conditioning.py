"""The laws of encoded prompts in a batch: ragged rows keep their text, whatever stands beside them."""

import pytest
import torch

from flowopd.records import Conditioning
from flowopd.rollouts import Sampler

ROWS = [torch.full((length, 2), float(length)) for length in (3, 1, 2)]


def test_ragged_rows_are_padded_to_the_longest_and_found_again():
    cond = Conditioning.ragged(ROWS)
    assert cond.tokens.shape == (3, 3, 2)
    assert cond.lengths() == [3, 1, 2]
    for i, row in enumerate(ROWS):
        assert torch.equal(cond[i : i + 1].trimmed().tokens[0], row)


def test_batches_of_different_lengths_are_stacked():
    first, second = Conditioning.ragged(ROWS[:1]), Conditioning.ragged(ROWS[1:])
    both = Conditioning.cat([second, first.expand(2)])
    assert both.lengths() == [1, 2, 3, 3]
    assert torch.equal(Conditioning.cat([second, first])[[2, 0, 1]].tokens, Conditioning.ragged(ROWS).tokens)


def test_texts_of_different_lengths_without_a_mask_are_refused():
    parts = [Conditioning(torch.zeros(1, length, 2)) for length in (3, 4)]
    with pytest.raises(ValueError, match=r"texts of \[3, 4\] tokens have no mask; expected one, or equal lengths"):
        Conditioning.cat(parts)


def test_a_cast_leaves_a_mask_a_mask():
    cond = Conditioning.ragged(ROWS).to(torch.bfloat16)
    assert (cond.tokens.dtype, cond.mask.dtype) == (torch.bfloat16, torch.bool)


def test_a_sampler_without_a_schedule_takes_its_model_s_own():
    class Model:
        def __init__(self, sigmas):
            self.grid = sigmas

        def schedule(self):
            return self

        def sigmas(self, num_steps):
            return self.grid

    own, other = Model(torch.tensor([1.0, 0.5, 0.0])), Model(torch.tensor([1.0, 0.9, 0.0]))
    sampler = Sampler(num_steps=2)
    assert torch.equal(sampler.on(own).sigmas(), own.grid)
    assert torch.equal(sampler.on(own).on(other).sigmas(), other.grid)
    assert torch.equal(Sampler(num_steps=2, schedule=own).on(other).sigmas(), own.grid)
    assert torch.equal(sampler.sigmas(), Sampler(num_steps=2).sigmas())
