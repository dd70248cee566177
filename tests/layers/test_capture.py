"""A captured memory layer: a replay of its device work does what a pass of its Python does."""

from itertools import product

import pytest
import torch

from megamem.config import MemoryConfig
from megamem.layers.memory import MemoryLayer
from megamem.layers.memory_pool import MemoryPool
from megamem.layers.variants import pool_names, table_names
from megamem.metrics import TABLE_SUMS, Metrics, TableMetrics, Watched
from megamem.optimizer import TableOptimizer
from megamem.resolution import resolve
from tests.helpers.captured import capture

WIDTH, TOKENS = 8, 3

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are interpreted only where there is no GPU"
)


class Trained:
    """A layer with its optimizer and metrics, and the memory that a graph reads and writes."""

    def __init__(self, variant: str) -> None:
        config = MemoryConfig(
            memory_layers=[0],
            memory_num_keys=4,
            memory_heads=1,
            memory_topk=2,
            memory_key_dim=8,
            memory_variant=variant,
            memory_wire="allgather",
        )
        spec = resolve(config, WIDTH, seed=1)
        self.pool = MemoryPool(spec, *pool_names(spec))
        self.layer = MemoryLayer(spec, self.pool)
        watched = Watched(
            layers=[0],
            tables=table_names(spec),
            num_keys=spec.keys_per_side,
            heads=1,
            topk=2,
            softmax=not spec.tucker_rank,
        )
        self.metrics = Metrics(watched, "cpu")
        self.layer.metrics = self.metrics.layers[0]
        for table in self.pool:
            table.metrics = self.metrics.tables[table.name]
        self.optimizer = TableOptimizer(self.pool, spec, lr=0.1)
        self.x = torch.zeros(TOKENS, 1, WIDTH, requires_grad=True)
        self.y = torch.zeros(TOKENS, 1, WIDTH)
        for weight in (self.x, *self.layer.parameters()):
            weight.grad = torch.zeros_like(weight)

    def pass_of_python(self) -> None:
        y = self.layer(self.x)
        y.square().sum().backward()
        self.y.copy_(y.detach())

    def load(self, batch: int) -> None:
        generator = torch.Generator().manual_seed(batch)
        with torch.no_grad():
            self.x.copy_(torch.randn(self.x.shape, generator=generator))

    def report(self) -> dict[str, object]:
        """All that training and reports see, but times, which depend on the clock."""
        for table in self.pool:
            table.metrics.fill(table.weight, table.shard, readers=table.readers)
        scalars = self.metrics.report(1).scalars
        found = {name: value for name, value in scalars.items() if "_ms/" not in name}
        found |= {"y": self.y.clone(), "dx": self.x.grad.clone()}
        found |= {name: weight.grad.clone() for name, weight in self.layer.named_parameters()}
        for name, table in ((table.name, table) for table in self.pool):
            gradient = table.gradient
            found |= {
                f"{name} rows": table.weight.detach().clone(),
                f"{name} counts": table.reads.counts.clone(),
                f"{name} touched": gradient.touched.clone(),
                f"{name} gradient": gradient.buffer.where(gradient.touched.unsqueeze(1), 0),
            }
        return found


@pytest.mark.parametrize(
    ("variant", "form"),
    [
        *product(("memory+", "peer"), ("add", "first_touch")),
        ("ultramem", "first_touch"),
        ("ultramem-v2", "add"),
    ],
)
def test_replays_do_what_passes_do(variant, form, monkeypatch) -> None:
    """Steps, read counts, metrics, and a batch that is dropped after it was accumulated."""
    monkeypatch.setenv("MEGAMEM_FORMS", f"row_gradient={form}")
    plain, captured = Trained(variant), Trained(variant)
    for model in (plain, captured):
        model.load(0)
    plain.pass_of_python()
    graph = capture(captured.pass_of_python, monkeypatch)
    assert "_row_pass_kernel" in graph.kernels

    # a number is a batch; the others follow on it
    steps = ("zero", 1, "step", "zero", 2, 3, "zero", 4, "step", "zero", 5)
    for step in steps:
        for model, one_pass in ((plain, plain.pass_of_python), (captured, graph.replay)):
            if step == "zero":
                model.optimizer.zero_grad()
            elif step == "step":
                model.optimizer.squared_norm()
                model.optimizer.step()
            else:
                model.load(step)
                one_pass()
        truth, found = plain.report(), captured.report()
        assert found.keys() == truth.keys()
        for name, value in truth.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=f"{name} at {step}")


def test_bytes_are_counted_in_a_replay(monkeypatch) -> None:
    metrics = TableMetrics(torch.zeros(len(TABLE_SUMS), dtype=torch.float64), torch.zeros(()))

    def send() -> None:
        metrics.bytes_sent += 1000

    graph = capture(send, monkeypatch)
    graph.replay()
    assert metrics.bytes_sent == 2000 == metrics.sums[TABLE_SUMS.index("bytes")]
