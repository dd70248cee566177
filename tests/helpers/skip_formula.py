"""Compares a model whose memories are added behind later layers with its formula, in one process.

    python -m megamem.run --cpu tests/helpers/skip_formula.py <flags>

The formula is written out here layer by layer: only attentions, norms and memories by themselves
are those of the model. Logits and the gradients of all weights, of tables as well, must agree. The
last line printed is the order in which the parts of the model were computed.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import torch.nn.functional as F
from megatron_releases import initialize
from saved_models import described_model
from torch import Tensor, nn

from megamem.layers.memory import MemoryLayer
from megamem.layers.value_table import ValueTable

SENTENCES = 2


def _by_formula(model: Any, tokens_BS: Tensor, places_BS: Tensor, hidden: Tensor, skip: int) -> Any:
    x_SBD = model.embedding(input_ids=tokens_BS, position_ids=places_BS)
    rotary = model.rotary_pos_emb(tokens_BS.shape[1])
    due: dict[int, Tensor] = {}
    for number, layer in enumerate(model.decoder.layers):
        attended, _ = layer.self_attention(
            layer.input_layernorm(x_SBD), attention_mask=hidden, rotary_pos_emb=rotary
        )
        x_SBD = x_SBD + attended
        normed_SBD = layer.pre_mlp_layernorm(x_SBD)
        memory = getattr(layer.mlp, "memory", None)
        ffn = layer.mlp if memory is None else layer.mlp.ffn
        if memory is not None:
            due[number + skip] = memory(normed_SBD)
        inner = F.gelu(F.linear(normed_SBD, ffn.linear_fc1.weight))
        x_SBD = x_SBD + F.linear(inner, ffn.linear_fc2.weight)
        x_SBD = x_SBD + due.pop(number, 0)
    assert not due
    weight = model.shared_embedding_or_output_weight()
    return F.linear(model.decoder.final_layernorm(x_SBD), weight).transpose(0, 1)


def _noted(events: list[str], name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, *rest: Any, **more: Any) -> Any:
        events.append(f"{name} {self.layer}")
        return real(self, *rest, **more)

    return call


def _ordered(model: Any, *given: Tensor) -> tuple[Tensor, list[str]]:
    """The logits of the model, and the order of its parts."""
    events: list[str] = []
    hooks = []
    for number, layer in enumerate(model.decoder.layers):
        ffn = getattr(layer.mlp, "ffn", layer.mlp)
        for name, part in (("attention", layer.self_attention), ("ffn", ffn)):

            def note(*_: Any, what: str = f"{name} {number}") -> None:
                events.append(what)

            hooks.append(part.register_forward_pre_hook(note))
    with (
        mock.patch.object(MemoryLayer, "launch", _noted(events, "launch", MemoryLayer.launch)),
        mock.patch.object(MemoryLayer, "collect", _noted(events, "collect", MemoryLayer.collect)),
    ):
        logits_BSv = model(*given)
    for hook in hooks:
        hook.remove()
    return logits_BSv, events


def main() -> None:
    args = initialize(None)
    (model,) = described_model(args)
    module: nn.Module = model
    for table in module.modules():
        if isinstance(table, ValueTable):
            # without an optimizer autograd computes the gradient
            table.weight = nn.Parameter(table.weight.data.clone())
    generator = torch.Generator().manual_seed(3)
    length = args.seq_length
    tokens_BS = torch.randint(0, args.padded_vocab_size, (SENTENCES, length), generator=generator)
    places_BS = torch.arange(length).expand_as(tokens_BS)
    hidden_11SS = torch.ones(1, 1, length, length).triu(1) > 0
    given = tokens_BS, places_BS, hidden_11SS
    logits_BSv, order = _ordered(model, *given)
    formula_BSv = _by_formula(model, *given, args.memory_skip)
    torch.testing.assert_close(logits_BSv, formula_BSv, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(logits_BSv.shape, generator=generator)
    names, weights = zip(*module.named_parameters(), strict=True)
    found, wanted = (torch.autograd.grad(y, weights, upstream) for y in (logits_BSv, formula_BSv))
    for name, ours, its in zip(names, found, wanted, strict=True):
        assert its.abs().max() > 0, name
        scale = float(its.abs().max())
        torch.testing.assert_close(ours, its, rtol=1e-4, atol=1e-5 * scale, msg=name)
    sys.stdout.write(f"{len(names)} gradients agree\n")
    sys.stdout.write(f"order: {', '.join(order)}\n")


if __name__ == "__main__":
    main()
