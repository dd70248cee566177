"""The released code of UltraMem and UltraMemV2 against the description of it and the converter.

    bash tests/ultramem.sh          fetches the code and what it imports, and runs this

The code is ZihaoHuang-notabot/Ultra-Sparse-Memory-Network at 041104b. Two modules are replaced: its
CUDA kernels, by the sums that they compute, and wandb, to which nothing is reported.
"""

import importlib.machinery
import os
import sys
import types
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megamem.tools.convert.released import convert_released
from megamem.tools.convert.released_file import Released
from tests.tools.released_model import Sizes, loss_of, random_checkpoint
from tests.tools.test_convert_ultramem import V1, V2, layer_of

CHECKOUT = os.environ.get("MEGAMEM_ULTRAMEM_CHECKOUT", "")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not CHECKOUT, reason="MEGAMEM_ULTRAMEM_CHECKOUT is not set; bash tests/ultramem.sh sets it"
    ),
]

QUERIES = {"own_queries": True}
MODELS = {
    "v1": V1,
    "v1, one head": replace(V1, memory_heads=1),
    "v1, added three layers later": replace(V1, way="0:3"),
    "v2": replace(V2, **QUERIES),
    "v2, two heads": replace(V2, memory_heads=2, **QUERIES),
    "v2, expanded": replace(V2, expansion=2, **QUERIES),
    "v2, every memory reads all rows": replace(V2, share=1, expansion=2, **QUERIES),
    "v2, half of the rows": replace(V2, share=0.5, **QUERIES),
}


class _Lookup:
    """The weighted sums of rows, by virtual blocks; each core weights its own columns."""

    @staticmethod
    def apply(ids: Tensor, table: Tensor, scores: Tensor, *numbers: Any) -> Tensor:
        _, ring, rows, first, blocks, _ = numbers
        values = table[(ids.long() % rows + first) % ring].unflatten(-1, (len(scores), -1))
        weighted = (values * scores.permute(1, 2, 0)[..., None]).flatten(2)
        of_block = F.one_hot(ids.long() // rows, blocks).to(weighted.dtype)
        return torch.einsum("tlv,tlb->tbv", weighted, of_block).flatten(1)


class _Dots:
    """The products of rows with tokens."""

    @staticmethod
    def apply(ids: Tensor, table: Tensor, tokens: Tensor, *numbers: Any) -> Tensor:
        ring, rows, first = numbers[:3]
        return torch.einsum("tlp,tp->tl", table[(ids.long() % rows + first) % ring], tokens)


def _replace(name: str, **content: Any) -> None:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__dict__.update(content)
    sys.modules[name] = module


@pytest.fixture(scope="module", autouse=True)
def _released_code() -> None:
    sys.path.insert(0, CHECKOUT)
    _replace("wandb", run=None)
    _replace("fuse_ops")
    _replace("fuse_ops.fused_index", FusedLookup=_Lookup, XperfGlu=_Dots)


def _model(sizes: Sizes) -> tuple[Any, Released]:
    """The released model in float64, with the weights of a checkpoint in which no key is odd."""
    from olmo.config import ModelConfig
    from olmo.model import OLMo

    source = Released(sizes.config(), random_checkpoint(sizes))
    # by default its norms compute in fp32
    model = OLMo(ModelConfig(**source.model, convert2fp32=False), init_params=False).double()
    model.load_state_dict(source.weights)
    return model.eval(), source


@pytest.mark.parametrize("kind", MODELS)
def test_the_description_of_the_model_is_that_of_the_code(kind: str) -> None:
    """Megatron's loss on converted checkpoints is compared with that of the description."""
    sizes = MODELS[kind]
    model, source = _model(sizes)
    tokens = torch.randperm(sizes.vocabulary, generator=torch.Generator().manual_seed(5))[:33]
    with torch.no_grad():
        logits = model(tokens[None, :-1]).logits[0]
    truth = F.cross_entropy(logits, tokens[1:]).item()
    # its rotary embedding is in fp32
    assert loss_of(source.weights, sizes, tokens) == pytest.approx(truth, rel=3e-7)


@pytest.mark.parametrize("kind", MODELS)
def test_a_converted_memory_computes_what_the_released_one_does(kind: str) -> None:
    """Forward and backward, of all weights, in float64."""
    sizes = MODELS[kind]
    model, source = _model(sizes)
    number = len(sizes.spans) - 1
    how = {"separate_tables": True} if "half" in kind else {}
    layer, spec = layer_of(convert_released(source, **how), sizes.spans[number][0])
    theirs = model.transformer.mem_blocks[number]
    x = torch.randn(9, 2, sizes.hidden, dtype=torch.float64, requires_grad=True)
    ring = (model.transformer.full_memory_layer,) if sizes.second else ()
    truth, mine = theirs(x, *ring), layer(x)
    torch.testing.assert_close(mine, truth)
    assert truth.std() > 0.1
    weights = [theirs.query_proj, theirs.values_proj, theirs.query_norm, theirs.keys_norm]
    own = [layer.query.linear, layer.output.proj, layer.query.norm, layer.keys.norm]
    grad = torch.randn_like(truth)
    wanted = torch.autograd.grad(
        truth, [x, theirs.keys, *theirs.tucker_core, *[w.weight for w in weights]], grad
    )
    found = torch.autograd.grad(
        mine, [x, layer.keys.sub_keys, layer.keys.cores, *[w.weight for w in own]], grad
    )
    torch.testing.assert_close(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1].permute(1, 0, 2, 4, 3))
    torch.testing.assert_close(found[2], torch.stack(wanted[2:4]))
    # of the queries of each rank the code uses those of one row and one column
    used = 2 * sizes.width
    torch.testing.assert_close(found[3], wanted[4][:used])
    assert not wanted[4][used:].any()
    for mine_grad, theirs_grad in zip(found[4:], wanted[5:], strict=True):
        torch.testing.assert_close(mine_grad, theirs_grad)
    # each row of the tables, in whatever order: the rows that were read have the same gradients
    table = ring[0].values_for_look_up if sizes.second else theirs.values_for_look_up
    [of_theirs] = torch.autograd.grad(theirs(x, *ring), [table], grad)
    [of_mine] = torch.autograd.grad(layer(x), [layer.pool.values.weight], grad)
    torch.testing.assert_close(_sorted_rows(of_mine), _sorted_rows(of_theirs))


def _sorted_rows(table: Tensor) -> Tensor:
    """The rows that are not zero, in the order of their sums."""
    read = table[table.abs().sum(1) > 0]
    return read[read.sum(1).argsort()]


def test_the_forward_of_shared_queries_fails_as_released() -> None:
    """It cuts a query of width C in two, and multiplies a half of it with keys of width C."""
    model, _ = _model(V2)
    with pytest.raises(RuntimeError, match=r"cannot be multiplied \(\d+x6 and 12x6\)"):
        model(torch.arange(8)[None])
