"""What runs while lookups, read-outs and their gradients are on the way between ranks."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megamem.config import MemoryConfig
from megamem.layers import linear
from megamem.layers.linear import LateWeights
from megamem.layers.memory import MemoryLayer
from megamem.layers.memory_pool import MemoryPool
from megamem.parallel import hops
from megamem.parallel.memory_group import form, partition
from megamem.resolution import resolve
from megamem.spec import Grid, Layout
from tests.helpers.distributed import run_distributed


def test_late_weights_have_the_gradients_of_a_linear() -> None:
    torch.manual_seed(1)
    x, weight, bias, grad = (
        torch.randn(*shape, dtype=torch.float64) for shape in ((2, 5, 4), (3, 4), (3,), (2, 5, 3))
    )
    given = [t.requires_grad_() for t in (x, weight, bias)]
    expected = torch.autograd.grad(F.linear(x, weight, bias), given, grad)
    y = LateWeights(weight, bias).linear(x)
    assert torch.equal(y, F.linear(x, weight, bias))
    for found, wanted in zip(torch.autograd.grad(y, given, grad), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    # frozen weights
    y = LateWeights(weight.detach(), bias.detach()).linear(x)
    torch.testing.assert_close(torch.autograd.grad(y, x, grad)[0], expected[0])


def _order(pieces: int) -> None:
    events: list[str] = []
    spec = resolve(
        MemoryConfig(
            memory_layers=[0], memory_num_keys=8, memory_topk=4, memory_heads=2, memory_key_dim=8
        ),
        64,
    )
    grid = Grid(1, 2, 2, 1)
    group = form(partition([[*range(grid.size)]], grid))
    spec = replace(spec, layout=Layout.of_grid(grid), wire="alltoall", pieces=pieces)
    layer = MemoryLayer(spec, MemoryPool(spec, group=group), group=group.members)

    def noted(name: str, real):
        def call(*args):
            events.append(name)
            return real(*args)

        return call

    with (
        mock.patch.object(hops.AllToAll, "send", noted("lookups", hops.AllToAll.send)),
        mock.patch.object(hops.Reduce, "send", noted("sums", hops.Reduce.send)),
        mock.patch.object(hops.Join, "send_back", noted("read-out", hops.Join.send_back)),
        mock.patch.object(hops.Gather, "send_back", noted("weights", hops.Gather.send_back)),
        mock.patch.object(
            linear._ComputeGradients,
            "backward",
            staticmethod(noted("projection", linear._ComputeGradients.backward)),
        ),
        mock.patch.object(layer.output, "compute_gate", noted("gate", layer.output.compute_gate)),
    ):
        x = torch.randn(8, 1, 64, requires_grad=True)
        y = layer(x, meanwhile=lambda: events.append("meanwhile"))
        forward = events.copy()
        events.clear()
        y.sum().backward()
    # numbers of lookups, then ids and weights of every piece, are on the way before anything else
    lookups = 1 + 2 * pieces
    assert forward[: lookups + 2] == ["lookups"] * lookups + ["gate", "meanwhile"]
    assert forward.count("sums") == pieces
    # gradients of read-outs of all pieces leave before those of the projection are computed, and
    # the gradients of lookups are on the way before it waits for them
    assert events.index("read-out") < events.index("projection")
    assert events.count("read-out") == pieces == events.count("weights")
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
    everybody = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, (forward, events))
    assert all(order == everybody[0] for order in everybody)


@pytest.mark.gloo
@pytest.mark.parametrize("pieces", [1, 2])
def test_gate_and_feed_forward_run_while_lookups_are_on_the_way(pieces: int) -> None:
    run_distributed(_order, 4, pieces)
