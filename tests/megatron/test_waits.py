"""Where a step of Megatron's makes the host wait: no line of megamem does."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megamem.megatron.optimizer.chain import ChainWithTables, TableMember
from megamem.parallel.collectives import HostCopy
from tests.gpu import syncs
from tests.helpers.megatron_runs import run_training
from tests.megatron.test_tiny_training import MEMORY, WIDE

# kernels stand in for the code of these on a GPU
TWINS = ("megamem/reference/", "megamem/ops/")


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (1, ()),
        (1, ("--memory-variant", "peer")),
        (1, ("--memory-variant", "ultramem")),
        (2, WIDE),
        (2, ("--memory-reduce-rows", "all", "--use-distributed-optimizer")),
    ],
    ids=["one rank", "peer", "ultramem", "rows over two ranks", "replicas"],
)
def test_no_line_of_megamem_waits_in_a_step(ranks: int, flags: tuple, tmp_path: Path) -> None:
    """A step counts ops that wait on a GPU, by the line that calls them."""
    found = tmp_path / "sites.json"
    log = run_training(
        "waits",
        ranks,
        *(*MEMORY, *flags),
        module="tests.gpu.syncs",
        environment={syncs.RESULT: str(found)},
    )
    assert len(log.losses) >= syncs.COUNTED_STEP
    sites = json.loads(found.read_text())
    ours = [site for site in sites if site.startswith("megamem/") and not site.startswith(TWINS)]
    assert ours == []
    # Megatron waits for its norm, so waits are seen
    assert any("clip_grads.py" in site for site in sites), sites


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the host waited for, in order."""
    waited: list[str] = []

    def numbers(self: HostCopy) -> Any:
        waited.append("tables")
        return self._numbers.tolist()

    monkeypatch.setattr(HostCopy, "numbers", numbers)
    yield waited


def _chain(order: list[str], norm: float, scaled: bool) -> ChainWithTables:
    """A chain of tables whose norm is on the way and of one member of the model."""
    tables = object.__new__(TableMember)
    tables.separate_clip, tables._squares_by_table, tables._numbers = "model", {}, None
    tables._norm, tables._scale, tables._found_inf = 0.0, 1.0, False
    tables.lowers_loss_scale, tables.data_ranks = scaled, 1
    tables._told_of_overflow = True

    def prepare_tables() -> bool:
        tables._numbers = HostCopy(torch.tensor([norm, norm, 0.5], dtype=torch.float64))
        return False

    def of_model() -> float:
        order.append("model")
        return 4.0

    tables.prepare_grads = prepare_tables  # type: ignore[method-assign]
    member = SimpleNamespace(
        prepare_grads=lambda: bool(scaled and of_model() < 0), get_grad_norm=of_model
    )
    chain = object.__new__(ChainWithTables)
    chain.chained_optimizers, chain.tables = [tables, member], tables
    chain.layer_gradients, chain._scalers = [], [object()] if scaled else []
    return chain


@pytest.mark.parametrize("scaled", [False, True], ids=["no loss scale", "loss scale"])
def test_the_numbers_of_the_tables_are_read_after_megatron_has_waited(
    order: list[str], scaled: bool
) -> None:
    chain = _chain(order, 3.0, scaled)
    assert chain.prepare_grads() is False
    assert order == (["model", "tables"] if scaled else [])
    assert chain.get_grad_norm() == 5.0
    assert order[0] == "model" and order.count("tables") == 1
    assert chain.tables.scale == 0.5 and not chain.tables.found_inf


@pytest.mark.parametrize("scaled", [False, True], ids=["no loss scale", "loss scale"])
def test_a_norm_that_is_not_finite_skips_the_step(order: list[str], scaled: bool) -> None:
    chain = _chain(order, float("nan"), scaled)
    # with a loss scale Megatron is told at once, so that it lowers the scale
    assert chain.prepare_grads() is scaled
    assert chain.get_grad_norm() == float("inf")
    assert chain.step_with_ready_grads() is False
