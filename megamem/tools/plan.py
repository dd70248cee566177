"""`megamem plan`: memory, traffic and time of the value table on a cluster, for every layout.

    python -m megamem plan --preset 1.3b --memory-num-keys 8192 --world-size 128
    python -m megamem plan --world-size 64 <the flags of a training run>
    python -m megamem plan "<the command line of a training run>"

It accepts all of Megatron's flags, so you can paste the command line of a run, in quotes with
torchrun and the script. It needs neither a GPU nor other ranks, and starts no training. The exit
status is 1 if no layout fits.
"""

import argparse
import contextlib
import io
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from megamem.config import ConfigurationError, MemoryConfig
from megamem.ops import tuning
from megamem.parallel.tuning import OFF
from megamem.planner import PRESETS, Cluster, Job, make_plan, preset
from megamem.planner.hardware import HARDWARE
from megamem.planner.plan import Plan
from megamem.resolution import resolve
from megamem.tools import command_line
from megamem.tools.plan_tables import show_plan

WIDTH_OF_A_FILE = 120

# flags that change sizes in ways that the planner does not support
UNPLANNED = {
    "heterogeneous_layers_config_path": "layers of different sizes",
    "use_megatron_fsdp": "Megatron's FSDP",
    "experimental_attention_variant": "this kind of attention",
    "account_for_embedding_in_pipeline_split": "the embedding as a layer of a stage",
    "account_for_loss_in_pipeline_split": "the loss as a layer of a stage",
}
# tokens of a step of a preset: those of examples/cluster
PRESET_TOKENS = 2048 * 4096
PRESET_MICROBATCH_TOKENS = 8192
LAYOUT_FLAGS = ("memory_mode", "memory_grid", "memory_group_size", "memory_column_ranks")


def run(args: argparse.Namespace) -> int:
    """Print the plan, write it to --json, and return the exit status."""
    args = args.parsed()
    job = job_from_args(args)
    with tuning.using(choices_from_args(args)):
        plan = make_plan(job)
    console = Console(width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE)
    defaults = MemoryConfig()
    asks = any(getattr(args, name) != getattr(defaults, name) for name in LAYOUT_FLAGS)
    show_plan(plan, console, asks=asks)
    if args.json:
        Path(args.json).write_text(json.dumps(as_json(plan), indent=2) + "\n")
        console.print(f"The plan was written to {args.json}.")
    return 0 if plan.recommended else 1


def add_flags(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Add the planner's own flags, the --memory-* flags and Megatron's."""
    _add_own_flags(parser)
    pasted = command_line.pasted(words)
    add_model_flags(parser, pasted)
    parser.set_defaults(parsed=lambda: parser.parse_args(pasted))


def add_model_flags(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Add the flags that describe a run, as add_run_flags() does.

    The flags that a --preset stands for become defaults.
    """
    add_run_flags(parser)
    chosen = parser.parse_args(words).preset
    if chosen:
        parser.set_defaults(**_preset_flags(chosen))


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that describe a run: its ranks, its memory layers, and Megatron's."""
    _add_cluster_flags(parser)
    with quiet_imports():
        from megatron.training.arguments import add_megatron_arguments

        from megamem.megatron.arguments import add_memory_flags

    add_memory_flags(parser)
    page = parser.format_help()
    add_megatron_arguments(parser)
    # Megatron's hundreds of flags would hide the planner's own in --help
    parser.format_help = lambda: page  # type: ignore[method-assign]


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Hides what Megatron warns of when it is imported: packages that only training needs."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def model_ranks(args: argparse.Namespace) -> int:
    """The number of ranks of one replica of the model."""
    tensor, pipeline = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    return int(tensor * pipeline * args.context_parallel_size)


def _add_cluster_flags(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "All other flags are Megatron's: --num-layers --hidden-size --ffn-hidden-size\n"
        "--num-attention-heads --vocab-size --seq-length --micro-batch-size --global-batch-size\n"
        "--tensor-model-parallel-size --pipeline-model-parallel-size --context-parallel-size\n"
        "--bf16 ... Flags that change no size are ignored."
    )
    add = parser.add_argument
    add(
        "--world-size",
        "--num-gpus",
        type=int,
        help="number of GPUs of the run (default: tensor x context x pipeline parallel size)",
    )
    add(
        "--gpus-per-node",
        type=int,
        default=8,
        help="GPUs of a node, which NVLink connects (default: %(default)s)",
    )
    add(
        "--preset",
        choices=PRESETS,
        help='use the flags of a base model of "Memory Layers at Scale" with its three memory '
        "layers, in bf16 and with the distributed optimizer, and steps of about 8 million tokens "
        "in microbatches of 8192; other flags override them",
    )


def _add_own_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("command", nargs="*", help="the command line of a training run, in quotes")
    add(
        "--gpu",
        choices=HARDWARE,
        default="h100",
        help="GPU for which the plan is made (default: %(default)s)",
    )
    add(
        "--fill",
        type=float,
        default=0.6,
        help="share of a GPU's memory that weights, gradients, optimizer state and lookup buffers "
        "may take; the rest is for activations (default: %(default)s)",
    )
    links = "GB/s that a GPU sends to {}, as megamem doctor measures it (default: that of --gpu)"
    add("--link-gbytes", type=float, help=links.format("GPUs of its node"))
    add("--network-gbytes", type=float, help=links.format("other nodes"))
    add("--json", metavar="FILE", help="also write the plan to this file")


def _preset_flags(name: str) -> dict[str, Any]:
    """Megatron's names of flags -> their values for a preset."""
    shape, places = preset(name)
    return {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "group_query_attention": True,
        "num_query_groups": shape.num_query_groups,
        "padded_vocab_size": shape.padded_vocab_size,
        "seq_length": shape.seq_length,
        "micro_batch_size": PRESET_MICROBATCH_TOKENS // shape.seq_length,
        "swiglu": shape.swiglu,
        "add_bias_linear": shape.add_bias_linear,
        "normalization": "RMSNorm",
        "untie_embeddings_and_output_weights": shape.untied,
        "position_embedding_type": "rope",
        "bf16": True,
        "use_distributed_optimizer": True,
        "memory_layers": places,
    }


def job_from_args(args: argparse.Namespace) -> Job:
    """The job that a command line describes.

    Raises:
        ConfigurationError: a size is missing or impossible, or the planner does not support a flag.
    """
    # it imports Megatron, which other commands do without
    from megamem.tools import plan_model

    ConfigurationError.collect(
        [
            f"--{name.replace('_', '-')}: megamem plan does not support {what}; remove the flag."
            for name, what in UNPLANNED.items()
            if getattr(args, name, None)
        ]
    )
    if not 0 < args.fill <= 1:
        raise ConfigurationError(f"--fill {args.fill} must be greater than 0 and at most 1.")
    link, network = _rate(args, "link_gbytes"), _rate(args, "network_gbytes")
    shape = plan_model.shape_from_args(args)
    tp, half = args.tensor_model_parallel_size, bool(args.bf16 or args.fp16)
    gradient_bytes, optimizer_bytes = plan_model.state_bytes(args, half)
    cluster = Cluster(
        world_size=args.world_size if args.world_size is not None else model_ranks(args),
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
        micro_batch_size=args.micro_batch_size if args.micro_batch_size is not None else 1,
        global_batch_size=args.global_batch_size,
        gpus_per_node=args.gpus_per_node,
        half_precision=half,
        use_distributed_optimizer=args.use_distributed_optimizer,
        num_distributed_optimizer_instances=args.num_distributed_optimizer_instances,
        use_torch_fsdp2=args.use_torch_fsdp2,
        placement=plan_model.placement_from_args(args, shape.num_layers),
        gradient_bytes=gradient_bytes,
        table_gradient_bytes=plan_model.table_gradient_bytes(args, half),
        optimizer_bytes=optimizer_bytes,
    )
    if args.preset and args.global_batch_size is None:
        # one microbatch is the least that a data-parallel rank takes
        step = cluster.micro_batch_size * cluster.data_parallel
        sequences = max(1, round(PRESET_TOKENS / shape.seq_length / step)) * step
        cluster = replace(cluster, global_batch_size=sequences)
    hardware = HARDWARE[args.gpu]
    spec = resolve(
        MemoryConfig.from_args(args),
        shape.hidden_size,
        tensor_ranks=tp,
        stage_ranks=cluster.stage_ranks,
        ranks_per_node=args.gpus_per_node,
        number_bytes=2 if cluster.half_precision else 4,
        link=link or hardware.link,
        network=network or hardware.network,
        batch_tokens=cluster.batch * shape.seq_length,
        microbatch_tokens=cluster.microbatch_tokens(shape.seq_length),
    )
    return Job(
        shape=shape,
        spec=spec,
        cluster=cluster,
        gpu=args.gpu,
        wire=args.memory_wire,
        link=link,
        network=network,
        fill=args.fill,
    )


def _rate(args: argparse.Namespace, name: str) -> float | None:
    """A rate in bytes per second from a flag in GB/s; None if it is not given."""
    # other commands that read a run have no such flag
    gbytes: float | None = getattr(args, name, None)
    if gbytes is not None and gbytes <= 0:
        raise ConfigurationError(f"--{name.replace('_', '-')} {gbytes:g} must be greater than 0.")
    return gbytes * 1e9 if gbytes else None


def choices_from_args(args: argparse.Namespace) -> tuning.Choices:
    """The choices of the kernels: those of the file of --memory-tuning, or those for the GPU.

    Raises:
        ConfigurationError: the file was not made by megamem tune, or for another kind of GPU.
    """
    hardware, path = HARDWARE[args.gpu], args.memory_tuning
    if path in (None, OFF):
        return tuning.of_capability(hardware.capability)
    try:
        read = tuning.read(Path(path))
    except ValueError as error:
        raise ConfigurationError(f"--memory-tuning: {error}") from error
    if read.machine.capability != hardware.capability:
        raise ConfigurationError(
            f"--memory-tuning {path} was measured on {read.machine.device}, but the plan is for "
            f"{hardware.name}; drop it, or choose another --gpu."
        )
    return read.choices


def as_json(plan: Plan) -> dict[str, Any]:
    """The complete plan as numbers and strings, in bytes and seconds."""
    costs = {}
    for cost in (*plan.costs, plan.asked):
        record = asdict(replace(cost, seconds={}))
        record["bytes"] |= {"table": cost.bytes.table, "total": cost.bytes.total}
        record["sent"] |= {"forward": cost.sent.forward, "backward": cost.sent.backward}
        record["sent"] |= {"inside": cost.sent.inside, "across": cost.sent.across}
        record["fits"] = cost.bytes.total <= plan.job.room
        record["flags"] = cost.flags
        record["seconds"] = {
            gpu: asdict(step)
            | {"lookup": step.lookup, "exchange": step.exchange, "optimizer": step.optimizer}
            | {"share": step.share}
            for gpu, step in cost.seconds.items()
        }
        costs[cost.name] = record
    return {
        "model": asdict(plan.job.shape),
        "memory": asdict(plan.job.spec),
        "cluster": asdict(plan.job.cluster),
        "gpu": plan.job.gpu,
        "fill": plan.job.fill,
        "parameters": plan.parameters,
        "bytes_per_table_parameter": asdict(plan.job.state),
        "layouts": costs,
        "active_parameters": plan.active,
        "asked": plan.asked.name,
        "recommended": plan.recommended.name if plan.recommended else None,
        "why": plan.why,
        "gpus_needed": plan.gpus_needed,
    }
