"""The convolution before the query, and dropout."""

import pytest
import torch
import torch.nn.functional as F

from megamem.layers.init import WeightFactory
from megamem.layers.query_conv import QueryConv
from megamem.parallel.collectives import _wanted_ranges
from tests.layers.test_losses import BATCH, HIDDEN, _hidden, _layer, _spec


def _conv(width: int) -> QueryConv:
    make = WeightFactory(seed=1, name="layer_0", dtype=torch.float64)
    return QueryConv(_spec(memory_query_conv=width), make, None)


@pytest.mark.parametrize("width", [1, 2, 5, 9])
def test_it_is_a_causal_depthwise_convolution_over_positions(width: int) -> None:
    conv, (x, grad) = _conv(width), _hidden(6)
    torch.nn.init.normal_(conv.weight)
    padded_BDS = F.pad(x.permute(1, 2, 0), (width - 1, 0))
    expected = F.conv1d(padded_BDS, conv.weight.t().unsqueeze(1), groups=HIDDEN).permute(2, 0, 1)
    out = conv(x.flatten(0, 1), BATCH, [6 * BATCH]).view_as(x)
    torch.testing.assert_close(out, expected)
    inputs = (x, conv.weight)
    ours, truth = (torch.autograd.grad(y, inputs, grad) for y in (out, expected))
    torch.testing.assert_close(ours, truth)
    assert sum(weight.numel() for weight in conv.parameters()) == width * HIDDEN


def test_it_starts_as_the_identity() -> None:
    x, _ = _hidden(6)
    assert _conv(4)(x.flatten(0, 1), BATCH, [6 * BATCH]).equal(x.flatten(0, 1))
    with_conv, without = _layer(_spec()), _layer(_spec(memory_query_conv=0))
    assert without.query_conv is None
    assert with_conv(x).equal(without(x))


def test_each_rank_gets_what_precedes_its_tokens() -> None:
    # ranks of 3, 0, 1 and 2 tokens want the 2 before theirs
    ranges = _wanted_ranges(2, [3, 0, 1, 2])
    sent = [[end - start for start, end in parts] for parts in ranges]
    assert sent == [[0, 2, 2, 1], [0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert ranges[0][1] == (1, 3)
    assert ranges[0][3] == (2, 3)
    assert ranges[2][3] == (0, 1)


def test_dropout_scales_what_it_keeps_and_ends_with_training() -> None:
    x, grad = _hidden(50)
    layer, plain = _layer(_spec(memory_dropout=0.25)), _layer(_spec())
    torch.manual_seed(0)
    out, whole = layer(x), plain(x)
    kept = out != 0
    torch.testing.assert_close(out, torch.where(kept, whole / 0.75, 0.0))
    assert kept.double().mean().item() == pytest.approx(0.75, abs=0.03)
    # another mask for each token, and each time
    assert len(kept.flatten(0, 1).unique(dim=0)) > 90
    assert not layer(x).equal(out)
    (ours,), (truth,) = (
        torch.autograd.grad(y, layer_.output.proj.weight, g)
        for y, layer_, g in ((out, layer, grad), (whole, plain, grad * kept / 0.75))
    )
    torch.testing.assert_close(ours, truth)
    layer.eval()
    assert layer(x).equal(whole)
