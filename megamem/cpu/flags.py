"""Sets the flags that Megatron needs on a CPU, and refuses those that do not work there."""

import argparse
import functools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megamem.cpu.hybrid import ON_CPU
from megamem.hybrid_pattern import symbols
from megamem.patching import require

# the name in args, the value that a CPU needs, and the flag that sets it
NEEDED: tuple[tuple[str, Any, str], ...] = (
    ("distributed_backend", "gloo", "--distributed-backend gloo"),
    ("transformer_impl", "local", "--transformer-impl local"),
    ("apply_rope_fusion", False, "--no-rope-fusion"),
    ("masked_softmax_fusion", False, "--no-masked-softmax-fusion"),
    ("gradient_accumulation_fusion", False, "--no-gradient-accumulation-fusion"),
    ("no_persist_layer_norm", True, "--no-persist-layer-norm"),
    # complete weights are drawn and then sharded, so they do not depend on the tensor-parallel size
    ("use_cpu_initialization", True, "--use-cpu-initialization"),
)


@dataclass(frozen=True)
class Refusal:
    """A flag that does not work on a CPU."""

    dest: str
    flag: str
    reason: str
    off: Sequence[Any] = (None, False)
    """Values with which the flag is off."""

    def problem(self, args: argparse.Namespace) -> str | None:
        """A message for the user if the flag is on, otherwise None."""
        value = getattr(args, self.dest, self.off[0])
        if value in self.off:
            return None
        shown = self.flag if value is True else f"{self.flag} {value}"
        return f"{shown} {self.reason}; with --cpu, drop it"


NEEDS_TE = "needs Transformer Engine and a GPU"
REFUSED = (
    Refusal("context_parallel_size", "--context-parallel-size", NEEDS_TE, off=(1,)),
    Refusal("fp8", "--fp8-format", NEEDS_TE),
    Refusal("fp4", "--fp4-format", NEEDS_TE),
    Refusal("tp_comm_overlap", "--tp-comm-overlap", NEEDS_TE),
    Refusal("moe_grouped_gemm", "--moe-grouped-gemm", NEEDS_TE),
    Refusal("cross_entropy_fusion_impl", "--cross-entropy-fusion-impl", NEEDS_TE, off=("native",)),
    Refusal("use_precision_aware_optimizer", "--use-precision-aware-optimizer", NEEDS_TE),
    Refusal(
        "optimizer_cpu_offload",
        "--optimizer-cpu-offload",
        "moves optimizer state from a GPU to the CPU",
    ),
    Refusal("cuda_graph_impl", "--cuda-graph-impl", "needs a GPU", off=(None, "none")),
    Refusal("multi_latent_attention", "--multi-latent-attention", NEEDS_TE),
    Refusal("layernorm_zero_centered_gamma", "--apply-layernorm-1p", NEEDS_TE),
    Refusal("moe_latent_size", "--moe-latent-size", NEEDS_TE),
    # its process divides by the number of GPUs, dies, and is waited for without end
    Refusal(
        "use_persistent_ckpt_worker",
        "--use-persistent-ckpt-worker",
        "starts a process that needs a GPU",
    ),
    Refusal("yaml_cfg", "--yaml-cfg", "replaces all flags, also those that --cpu sets"),
    Refusal("enable_cuda_graph", "--enable-cuda-graph", "needs a GPU"),
    Refusal("external_cuda_graph", "--external-cuda-graph", "needs a GPU"),
)


def adapt_parser(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Give a parser the defaults for a CPU, and make it refuse flags that do not work there.

    Returns the parser.

    Raises:
        RuntimeError: this release of Megatron lacks a flag that has to be set.
    """
    actions = {action.dest: action for action in parser._actions}
    absent = [flag for dest, _, flag in NEEDED if dest not in actions]
    if absent:
        raise RuntimeError(
            f"this release of Megatron has no {', '.join(absent)}, which --cpu sets; install a "
            "release that setup.py of megamem names"
        )
    parser.set_defaults(**{dest: value for dest, value, _ in NEEDED})
    parse = parser.parse_known_args

    def parse_known_args(args: Any = None, namespace: Any = None) -> Any:
        given = sys.argv[1:] if args is None else list(args)
        parsed, rest = parse(args, namespace)
        problems = find_problems(parsed)
        if problems:
            parser.error("; ".join(problems))
        allow_fsdp(parsed)
        announce(tuple(flag for dest, _, flag in NEEDED if not _is_given(actions[dest], given)))
        return parsed, rest

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign]
    return parser


def find_problems(args: argparse.Namespace) -> list[str]:
    """A message, with the fix, for each flag that does not work on a CPU."""
    wrong_values = [
        f"{flag.split()[0]} {getattr(args, dest)} needs a GPU; with --cpu, drop it or write {flag}"
        for dest, value, flag in NEEDED
        if getattr(args, dest) != value
    ]
    refused = [*filter(None, (refusal.problem(args) for refusal in REFUSED))]
    recomputed = getattr(args, "recompute_modules", None) or ()
    # their outputs are dropped by a function that asks Transformer Engine for its state
    refused += [
        f"--recompute-modules {module} {NEEDS_TE}; with --cpu, drop {module} from "
        f"{' '.join(recomputed)}"
        for module in ("layernorm", "mhc")
        if module in recomputed
    ]
    pattern = getattr(args, "hybrid_layer_pattern", None) or ""
    if unsupported := "".join(sorted(set(symbols(pattern)) - set(ON_CPU))):
        refused.append(
            f"--hybrid-layer-pattern {pattern} has layers ({unsupported}) that need GPU kernels; "
            f"with --cpu, use only {' '.join(ON_CPU)}"
        )
    return [*wrong_values, *refused]


def allow_fsdp(args: argparse.Namespace) -> None:
    """Unset the variable that Megatron requires for tensor parallelism, and refuses for FSDP."""
    if getattr(args, "use_torch_fsdp2", False):
        os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)


@functools.cache  # Megatron parses the command line several times
def announce(flags: tuple[str, ...]) -> None:
    """Write the flags that --cpu has set in one line, on the first rank."""
    if flags and os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"megamem: --cpu sets {' '.join(flags)}\n")


def _is_given(action: argparse.Action, given: Sequence[str]) -> bool:
    names = tuple(action.option_strings)
    return any(word in names or word.split("=", 1)[0] in names for word in given)


def adapt_flags() -> None:
    """Apply adapt_parser() to every parser that Megatron makes from now on."""
    import megatron.training.arguments as arguments

    from megamem.patching import replace

    def make(add_megatron_arguments: Callable) -> Callable:
        return lambda parser: adapt_parser(add_megatron_arguments(parser))

    require(arguments, "add_megatron_arguments")
    replace(arguments, "add_megatron_arguments", make)
