"""Refuses settings that memory layers do not work with, before anything is allocated."""

import argparse
from collections.abc import Callable

from megamem.config import ConfigurationError
from megamem.megatron import compat
from megamem.megatron.startup.data_checks import data_problems
from megamem.megatron.startup.features import feature_problems
from megamem.ops import forms
from megamem.spec import MemorySpec


def check(spec: MemorySpec, args: argparse.Namespace) -> None:
    """Refuse everything that cannot work, in one error.

    Args:
        spec: the spec of the run.
        args: the arguments of Megatron, validated by Megatron.

    Raises:
        ConfigurationError: something cannot work; the message names flags, values and fixes.
    """
    ConfigurationError.collect([said for problems in CHECKS for said in problems(spec, args)])


def depth_problems(spec: MemorySpec, args: argparse.Namespace) -> list[str]:
    """A sentence if --memory-layers names layers that the model does not have."""
    beyond = [layer for layer in spec.layers if layer >= args.num_layers]
    if not beyond:
        return []
    return [
        f"--memory-layers {_words(beyond)} is out of range: layers are counted from 0, and "
        f"with --num-layers {args.num_layers} the last is layer {args.num_layers - 1}."
    ]


def pattern_problems(spec: MemorySpec, args: argparse.Namespace) -> list[str]:
    """A sentence if --memory-layers names layers of a hybrid model that are no feed-forwards."""
    kinds = compat.feed_forwards(args)
    wrong = [n for n in spec.layers if n < len(kinds) and not kinds[n]]
    if not wrong:
        return []
    there = [layer for layer, kind in enumerate(kinds) if kind]
    return [
        f"--memory-layers {_words(wrong)} is no feed-forward: --hybrid-layer-pattern "
        f"{args.hybrid_layer_pattern}, counted from 0, has "
        + (f"them elsewhere; use some of {_words(there)}." if there else "none; add some (-).")
    ]


def _words(numbers: list[int]) -> str:
    return " ".join(map(str, numbers))


def optimizer_problems(spec: MemorySpec, args: argparse.Namespace) -> list[str]:
    """A sentence for each setting of the tables' optimizer that lacks another one."""
    problems = []
    if spec.lr_schedule == "constant" and spec.lr == "model":
        problems.append(
            "--memory-lr-schedule constant needs a learning rate of its own; add --memory-lr, such "
            f"as --memory-lr {getattr(args, 'lr', None) or 1e-3}."
        )
    if spec.stochastic_rounding and not args.bf16:
        problems.append(
            "--memory-stochastic-rounding rounds to bf16, but the model is not in bf16; add --bf16 "
            "or drop --memory-stochastic-rounding."
        )
    return problems


def piece_problems(spec: MemorySpec, args: argparse.Namespace) -> list[str]:
    """A sentence if a microbatch has fewer tokens on a rank than there are pieces."""
    if args.micro_batch_size is None or args.seq_length is None:
        return []
    shares = args.tensor_model_parallel_size * args.context_parallel_size
    tokens = max(1, args.micro_batch_size * args.seq_length // shares)
    if spec.pieces <= tokens:
        return []
    return [
        f"--memory-pieces {spec.pieces} is more than the {tokens} tokens of a microbatch on a rank "
        f"(--micro-batch-size x --seq-length / tensor and context parallel sizes); use at most "
        f"{tokens}, usually 2 to 4."
    ]


def form_problems(spec: MemorySpec, args: argparse.Namespace) -> list[str]:
    """A sentence if the environment selects a form of a kernel that does not exist."""
    try:
        forms.selected()
    except ValueError as error:
        return [str(error)]
    return []


CHECKS: tuple[Callable[[MemorySpec, argparse.Namespace], list[str]], ...] = (
    data_problems,
    feature_problems,
    depth_problems,
    pattern_problems,
    optimizer_problems,
    piece_problems,
    form_problems,
)
"""Functions of (spec, validated args) that return a sentence for each thing that cannot work."""
