"""Generation by Megatron's engines, where replicas of a model share a table.

A forward of a memory layer exchanges lookups with all ranks of its memory group. Where that group
is wider than the tensor-parallel group, its ranks belong to several replicas of the model. These
write different texts, in different numbers of forwards, so while the static engine runs

    every forward exchanges the numbers of tokens first, and
    a replica that has no more requests takes part in the others' forwards, without tokens, until
    all replicas are done.

The static engine must therefore be run by all ranks of a memory group, any of which may have no
request. The dynamic engine is refused there, as it runs without an end.
"""

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.inference.contexts.dynamic_context import MaxSequenceLengthOverflowError
from megatron.core.inference.engines import DynamicInferenceEngine, StaticInferenceEngine
from torch import nn

from megamem.config import ConfigurationError
from megamem.layers.memory import MemoryLayer
from megamem.parallel.collectives import group_size
from megamem.patching import replace

LONGEST, LONGEST_OF_TOOLS = "inference_max_seq_length", "inference_max_sequence_length"
"""The argument of --inference-max-seq-length, and the name by which tools/ of Megatron read it."""


def install_generation() -> None:
    """Replace what generation with memory layers needs; a second call changes nothing."""
    replace(StaticInferenceEngine, "run_engine", _join_the_others)
    replace(DynamicInferenceEngine, "__init__", _refuse_wide_groups)


def name_longest(args: argparse.Namespace) -> None:
    """Let tools/run_text_generation_server.py read the longest sequence, which it misnames.

    It is at most that of the positions of the model, so that the engine refuses longer requests.
    """
    if hasattr(args, LONGEST) and not hasattr(args, LONGEST_OF_TOOLS):
        longest = min(getattr(args, LONGEST), args.max_position_embeddings)
        setattr(args, LONGEST_OF_TOOLS, longest)


def layers_of_wide_groups(model: nn.Module) -> list[MemoryLayer]:
    """The memory layers of a model, in their order, that other replicas of it must take part in."""
    layers = [module for module in model.modules() if isinstance(module, MemoryLayer)]
    return [each for each in layers if each.pool.group.world_size > group_size(each.group)]


def _join_the_others(original: Callable[..., Any]) -> Callable[..., Any]:
    def run_engine(self: Any, *rest: Any, **more: Any) -> Any:
        layers = layers_of_wide_groups(self.controller.inference_wrapped_model.model)
        with _counted_tokens(layers), torch.inference_mode():
            try:
                result = original(self, *rest, **more)
            except MaxSequenceLengthOverflowError as error:
                _forget_requests(self.scheduler)
                raise ValueError(str(error)) from error
            while layers and all(layer.join() for layer in layers):
                pass
        return result

    return run_engine


def _forget_requests(scheduler: Any) -> None:
    """Drop the requests that are too long, which would fail again with every later one.

    As a ValueError, their error is the answer of Megatron's server, and does not end other ranks.
    """
    scheduler.active_request_pool.clear()
    scheduler.waiting_request_pool.clear()


@contextlib.contextmanager
def _counted_tokens(layers: Sequence[MemoryLayer]) -> Iterator[None]:
    """Exchange the numbers of tokens before each lookup of these layers."""
    before = [layer.tokens_vary for layer in layers]
    try:
        for layer in layers:
            layer.tokens_vary = True
        yield
    finally:
        for layer, varied in zip(layers, before, strict=True):
            layer.tokens_vary = varied


def _refuse_wide_groups(original: Callable[..., None]) -> Callable[..., None]:
    def __init__(self: Any, controller: Any, *rest: Any, **more: Any) -> None:
        if layers := layers_of_wide_groups(controller.inference_wrapped_model.model):
            ranks, own = layers[0].pool.group.world_size, group_size(layers[0].group)
            raise ConfigurationError(
                f"--memory-group-size {ranks} does not work with Megatron's dynamic inference "
                f"engine, because replicas of the model would wait for each other's lookups; load "
                f"the checkpoint with --memory-group-size {own}, or use the static engine, as "
                "examples/generate.py does."
            )
        original(self, controller, *rest, **more)

    return __init__
