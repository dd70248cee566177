"""Which features of a run work beside memory layers: the README's matrix, and `doctor --flags`.

python -m megamem.tools.support README.md     rewrites the matrix in this file
"""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megamem.config import ConfigurationError, MemoryConfig
from megamem.errors import suggestion
from megamem.megatron import compat
from megamem.megatron.startup import checks
from megamem.megatron.startup.data_checks import data_problems
from megamem.megatron.startup.features import FEATURES, Feature, State, feature_problems
from megamem.resolution import resolve
from megamem.spec import MemorySpec
from megamem.tools import command_line, markers, plan

SHOWN: dict[State, str] = {
    "yes": "[green]yes[/]",
    "refused": "[red]REFUSED[/]",
    "not run on a GPU": "[yellow]not run on a GPU[/]",
}
WIDTH_OF_A_FILE = 140
# the datasets may be on another machine, and the features are listed one by one
LISTED_OTHERWISE = (data_problems, feature_problems)


@dataclass(frozen=True)
class Row:
    """What a command line uses."""

    name: str
    option: str
    state: State
    said: str = ""
    """Why it is refused and what to do, or what it needs."""


def matrix() -> str:
    """The matrix as a Markdown table with a row for every feature."""
    rows = ["| | flags | works |", "|---|---|---|"]
    for part, features in groupby(FEATURES, key=lambda feature: feature.part):
        rows.append(f"| **{part}** | | |")
        rows += [
            f"| {each.name} | {_as_code(each.option)} | {_verdict(each)} |" for each in features
        ]
    return "\n".join(rows)


def _as_code(text: str) -> str:
    """The text with every flag as code."""
    return re.sub(r"(?<!\w)(--[a-z0-9-]+(?: (?:RMSNorm|[a-z]+_[a-z_]+))?)", r"`\1`", text)


def _verdict(feature: Feature) -> str:
    if feature.state == "yes":
        return f"[yes](tests/{feature.test.partition('::')[0]})"
    if feature.state == "refused":
        return _as_code(f"refused: {feature.why}; {feature.fix}")
    return feature.state


def rewrite(readme: str) -> str:
    """The same text with the current matrix between its markers."""
    return markers.rewrite(readme, "support", matrix())


def check_flags(words: Sequence[str], parser: argparse.ArgumentParser) -> int:
    """Print what a command line uses and whether it works; return 1 if it is refused, else 0.

    Args:
        words: the command line, in one word or split.
        parser: an empty parser, which gets the flags of a run.

    Raises:
        ConfigurationError: the command line cannot be read.
    """
    args, unknown = parse(words, parser)
    rows = used(args)
    console = Console(width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE)
    table = Table(title="What these flags use", title_justify="left")
    table.add_column("feature", overflow="fold")
    table.add_column("flags", overflow="fold")
    table.add_column("works", no_wrap=True)
    table.add_column("why, and what to do", overflow="fold")
    for row in rows:
        table.add_row(row.name, row.option, SHOWN[row.state], row.said)
    console.print(table)
    if unknown:
        hint = suggestion(f"unrecognized arguments: {' '.join(unknown)}", _flags(parser))
        console.print(f"Not flags of this release of Megatron: {' '.join(unknown)}{hint}.")
    if not getattr(args, "memory_layers", None):
        console.print("Without --memory-layers only Megatron's own flags are checked; add it.")
    refused = sum(row.state == "refused" for row in rows)
    untried = sum(row.state == "not run on a GPU" for row in rows)
    if refused:
        console.print(f"[red]Refused:[/] {refused} of these; see the rows marked REFUSED above.")
    else:
        but = f"; {untried} of them have not been run on a GPU" if untried else ""
        console.print(f"[green]Accepted:[/] all of these can run beside memory layers{but}.")
    return 1 if refused else 0


def parse(
    words: Sequence[str], parser: argparse.ArgumentParser
) -> tuple[argparse.Namespace, list[str]]:
    """The arguments of a command line, not validated by Megatron, and the flags it does not know.

    Raises:
        ConfigurationError: the command line cannot be read.
    """
    command = command_line.read(words)
    plan.add_run_flags(parser)
    args, rest = parser.parse_known_args(command.flags)
    _complete(args)
    if args.world_size is None:
        args.world_size = command.ranks or plan.model_ranks(args)
    return args, [word for word in rest if word.startswith("--")]


def _complete(args: argparse.Namespace) -> None:
    """Set what Megatron derives from other flags when it validates them, as far as it is needed.

    Megatron's own validation needs the GPUs, ranks and packages of the run.
    """
    if getattr(args, "hybrid_layer_pattern", None) and args.num_layers is None:
        args.num_layers = len(compat.feed_forwards(args))
    shards = getattr(args, "tensor_parallel_num_weight_shards", None) or 1
    args.gtp_weight_remat_size = max(1, shards // args.tensor_model_parallel_size)
    # older spellings
    if getattr(args, "external_cuda_graph", False):
        args.cuda_graph_impl = "transformer_engine"
    if parts := getattr(args, "cuda_graph_scope_deprecated", None):
        args.cuda_graph_modules = parts


def used(args: argparse.Namespace) -> list[Row]:
    """What a run with these arguments uses, whether it works, and what else is refused."""
    try:
        spec = _spec(args)
    except ConfigurationError as error:
        rows = _of_features(args, None)
        return [*rows, Row("memory layers", "--memory-...", "refused", str(error))]
    rows = _of_features(args, spec)
    if spec is None:
        return rows
    said = [
        sentence
        for problems in checks.CHECKS
        if problems not in LISTED_OTHERWISE
        for sentence in problems(spec, args)
    ]
    return [*rows, *(Row("memory layers", "--memory-...", "refused", each) for each in said)]


def _of_features(args: argparse.Namespace, spec: MemorySpec | None) -> list[Row]:
    rows = []
    for feature in FEATURES:
        if feature.state != "refused":
            if feature.uses(args):
                rows.append(Row(feature.name, feature.option, feature.state, feature.why))
        elif said := _refusal(feature, args, spec):
            rows.append(Row(feature.name, feature.option, "refused", said))
    return rows


def _refusal(feature: Feature, args: argparse.Namespace, spec: MemorySpec | None) -> str:
    """Why a run is refused, and what to do; empty if it is not."""
    if type(feature) is Feature:
        return f"{feature.why}; {feature.fix}" if feature.uses(args) else ""
    # the others depend on the memory layers
    return (feature.problem(spec, args) or "") if spec is not None else ""


def _spec(args: argparse.Namespace) -> MemorySpec | None:
    """The spec of the run; None without memory layers, or if the model's sizes are not given.

    Raises:
        ConfigurationError: the flags do not fit each other, the hidden size or the ranks.
    """
    config = MemoryConfig.from_args(args)
    if not config.enabled or args.hidden_size is None or args.num_layers is None:
        return None
    return resolve(
        config,
        args.hidden_size,
        tensor_ranks=args.tensor_model_parallel_size,
        stage_ranks=args.world_size // args.pipeline_model_parallel_size,
        ranks_per_node=args.gpus_per_node,
    )


def _flags(parser: argparse.ArgumentParser) -> list[str]:
    return list(parser._option_string_actions)


def main() -> None:
    """Rewrite the matrix in the file named on the command line."""
    path = Path(sys.argv[1])
    path.write_text(rewrite(path.read_text()))


if __name__ == "__main__":
    main()
