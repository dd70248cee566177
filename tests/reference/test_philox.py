"""Random numbers that are a function of where they stand."""

import math

import pytest
import torch

from megamem.reference.philox import philox, random_rows

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "seed", "words"),
    [
        # known answers of the Random123 distribution
        ([0, 0, 0, 0], 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([ONES] * 4, ONES << 32 | ONES, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0 << 32 | 0xA4093822,
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_known_answers(counter, seed, words):
    assert philox(torch.tensor(counter).unsqueeze(-1), seed).flatten().tolist() == words


def test_rows_do_not_depend_on_which_rows_are_drawn():
    rows = torch.tensor([3, 0, 2**40 + 1, 7])
    together = random_rows(rows, 10, seed=5, stream=1, distribution="normal")
    for i in range(len(rows)):
        alone = random_rows(rows[i : i + 1], 10, seed=5, stream=1, distribution="normal")
        assert torch.equal(alone[0], together[i])
    narrow = random_rows(rows, 4, seed=5, stream=1, distribution="normal")
    assert torch.equal(narrow, together[:, :4])


def test_seed_stream_row_and_column_all_count():
    rows = torch.tensor([1, 2, 1 + 2**32])
    draws = [
        random_rows(rows, 8, seed, stream, "uniform")
        for seed, stream in ((1, 0), (2, 0), (1 + 2**32, 0), (1, 1), (-1, 0))
    ]
    numbers = torch.stack(draws).flatten()
    assert len(numbers.unique()) == len(numbers)


@pytest.mark.parametrize(
    ("distribution", "variance", "fourth"), [("normal", 1, 3), ("uniform", 1 / 3, 1 / 5)]
)
def test_moments(distribution, variance, fourth):
    x = random_rows(torch.arange(2000), 50, seed=0, stream=0, distribution=distribution)
    assert x.dtype == torch.float64 and x.shape == (2000, 50)
    # five standard errors of the mean of each power
    for power, mean, spread in ((1, 0, variance), (2, variance, fourth - variance**2)):
        error = abs(x.pow(power).mean().item() - mean)
        assert error < 5 * math.sqrt(spread / x.numel())
    assert abs(x.pow(4).mean().item() - fourth) < 0.1 * fourth
    # neighbours in a row and in a column share nothing
    for a, b in ((x[:, :-1], x[:, 1:]), (x[:-1], x[1:])):
        assert abs((a * b).mean().item()) < 5 * variance / math.sqrt(a.numel())


def test_uniform_stays_off_the_ends():
    x = random_rows(torch.arange(1000), 8, seed=9, stream=2, distribution="uniform")
    assert -1 < x.min() < -0.99 and 0.99 < x.max() < 1
