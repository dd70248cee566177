"""What UltraMem and UltraMemV2 save for the backward is what is planned, and so is the peak."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from megamem.config import MemoryConfig
from megamem.layers.memory import MemoryLayer
from megamem.layers.memory_pool import MemoryPool
from megamem.optimizer import StepOptions, TableOptimizer
from megamem.parallel.memory_group import MemoryGroup
from megamem.planner import Cluster, Job, ModelShape
from megamem.planner.buffers import kept_bytes, passing_bytes
from megamem.resolution import resolve
from megamem.spec import MemorySpec
from megamem.tools import memory_peaks

TOKENS, HIDDEN = 64, 128
FORMS = "tucker_topk=triton,tucker_topk_backward=triton"
V1 = {"memory_variant": "ultramem"}
V2 = {"memory_variant": "ultramem-v2", "memory_heads": 2}
DEFAULTS = {"memory_core_aux_weight": 0.0, "memory_init": "released", "memory_topk": 16}
CASES = {
    "V1": V1,
    "V1 one projection": V1 | {"memory_expansion_proj": "single", "memory_cores": 1},
    "V2": V2,
    "V2 expanded top": V2 | {"memory_final_topk": 48, "memory_tucker_rank": 3},
    "V2 blocks": V2 | {"memory_expansion": 4, "memory_expansion_proj": "block"},
    "V2 four cores": V2 | {"memory_cores": 4, "memory_value_dim": 64},
    "V1 convolution": V1 | {"memory_query_conv": 3},
}


def _job(settings: dict, ranks: int = 1) -> Job:
    config = MemoryConfig(
        memory_layers=[0],
        memory_num_keys=64,
        memory_key_dim=32,
        memory_group_size=ranks,
        **DEFAULTS | settings,
    )
    shape = ModelShape(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=1,
        padded_vocab_size=1,
        seq_length=TOKENS,
    )
    spec = resolve(config, HIDDEN, seed=0)
    return Job(shape=shape, spec=spec, cluster=Cluster(world_size=ranks), wire=config.memory_wire)


@pytest.fixture
def _no_kernels(monkeypatch) -> None:
    """Kernels and RMSNorm as on a GPU, with meaningless results."""
    monkeypatch.setenv("MEGAMEM_FORMS", FORMS)
    monkeypatch.setattr(InterpretedFunction, "run", InterpretedFunction.run)
    monkeypatch.setattr(torch.nn.functional, "rms_norm", torch.nn.functional.rms_norm)
    memory_peaks.leave_kernels_out()


def _built(spec: MemorySpec, group: MemoryGroup) -> tuple[MemoryLayer, torch.Tensor]:
    pool = MemoryPool(spec, group=group, dtype=torch.bfloat16)
    for table in pool:
        table.leave_to_optimizer()
    layer = MemoryLayer(spec, pool, group=group.members, dtype=torch.bfloat16)
    TableOptimizer(pool, spec, StepOptions(), lr=1e-3, weight_decay=0.1)
    hidden = torch.randn(TOKENS, 1, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    return layer, hidden


@contextmanager
def _saved(layer: MemoryLayer) -> Iterator[dict[int, int]]:
    """Address -> bytes of everything that autograd saves, but the weights."""
    held: list[torch.Tensor] = []
    found: dict[int, int] = {}
    own = {x.untyped_storage().data_ptr() for x in layer.parameters()}
    own |= {table.weight.untyped_storage().data_ptr() for table in layer.pool}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if (address := x.untyped_storage().data_ptr()) not in own:
            held.append(x)
            found[address] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        yield found


@pytest.mark.usefixtures("_no_kernels")
@pytest.mark.parametrize("case", CASES)
def test_one_rank_saves_what_is_planned(case: str) -> None:
    job = _job(CASES[case])
    layer, hidden = _built(job.spec, MemoryGroup())
    with _saved(layer) as found:
        layer(hidden)
    # the last offset of bags, and of tokens, is the number of lookups
    ends = 16 if case == "V2 blocks" else 8
    assert sum(found.values()) == kept_bytes(job, job.spec.layout) + ends


@pytest.mark.usefixtures("_no_kernels")
@pytest.mark.parametrize("case", ["V1", "V2", "V2 expanded top", "V2 blocks"])
def test_the_peak_of_one_rank_is_as_planned(case: str) -> None:
    job = _job(CASES[case])
    layer, hidden = _built(job.spec, MemoryGroup())
    with memory_peaks.CpuPeaks() as recorder:
        recorder("forward")
        y = layer(hidden)
        recorder("backward")
        y.sum().backward()
        recorder("norm")
    peaks = recorder.peaks()
    planned = kept_bytes(job, job.spec.layout) - hidden.nbytes
    planned += passing_bytes(job, job.spec.layout)
    # some of what is saved is freed before the peak
    assert max(peaks["forward"], peaks["backward"]) == pytest.approx(planned, rel=0.15)
