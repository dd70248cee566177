"""Runs an unmodified training script with megamem's hooks in place.

    [torchrun ...] python -m megamem.run [--cpu] SCRIPT ARGUMENTS...

The hooks are installed first, then the script runs as __main__ as if python had started it. What a
person got wrong is said in one line, on one rank, without a traceback; everything else keeps its
traceback.
"""

import argparse
import difflib
import os
import re
import runpy
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from megamem.config import ConfigurationError

USAGE = """usage: python -m megamem.run [--cpu] SCRIPT ARGUMENTS...
       torchrun --nproc-per-node N -m megamem.run [--cpu] SCRIPT ARGUMENTS...

Runs a Megatron training script, unmodified, with memory layers at its disposal.

  SCRIPT       Megatron-LM's pretrain_gpt.py, or examples/pretrain_gpt.py of megamem
  ARGUMENTS    the script's own flags, and --memory-... (SCRIPT --help lists them all)
  --cpu        train on the CPU, over gloo; for dry runs and tests. The flags that Megatron needs
               for it are set, and named.
  --cpu=force  the same on a machine that has a GPU, which stays idle
"""
USER_ERROR = 2
# torchrun ends all ranks as soon as one has ended: the first rank of a run, then of a node, speaks
# before the others
SECONDS_TO_READ = 3.0


@dataclass(frozen=True)
class Command:
    """What the launcher was asked for."""

    script: str
    arguments: list[str]
    cpu: bool = False
    force_cpu: bool = False


def main(argv: Sequence[str] | None = None, *, ends_process: bool | None = None) -> int:
    """Run the script that argv names; return its exit status, or leave as the script left.

    Args:
        argv: the launcher's words; those of the process by default.
        ends_process: whether this is all that the process does, so that a rank that fails may end
            it at once. By default where argv is not given.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if ends_process is None:
        ends_process = argv is None
    try:
        return _main(words)
    except BaseException as error:
        if ends_process:
            end_process(error, sys.excepthook)
        raise


def end_process(error: BaseException, show: Callable[..., object]) -> None:
    """Leave without waiting for other ranks, where there are any; else return."""
    # without it there are none, and importing it takes seconds
    if "torch.distributed" in sys.modules:
        from megamem.integration import lost_ranks

        lost_ranks.end_process(error, show)


def _main(words: list[str]) -> int:
    if words and words[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0
    try:
        command = parse(words)
        import_beside(command.script)
        set_rendezvous_defaults()
        if command.cpu:
            from megamem.integration import cpu_runtime

            cpu_runtime.install(force=command.force_cpu)
        # imports Megatron, which the CPU runtime must precede
        from megamem.integration import hooks

        hooks.install()
        use_helpers_of_the_wheel()
        run_as_main(command)
    except ConfigurationError as error:
        stop(str(error))
    except Exception as error:
        say_if_lost(error, sys.excepthook)
        raise
    return 0


def say_if_lost(error: BaseException, show: Callable[..., object]) -> None:
    """A rank that ends because another one did says so below the traceback of where it was.

    Args:
        show: an excepthook; it shows the traceback.
    """
    from megamem.integration import lost_ranks

    if message := lost_ranks.explain(error):
        lost_ranks.show_with(show, error)
        stop(message)


def parse(words: Sequence[str]) -> Command:
    """The launcher's own options, then the script; what follows is the script's."""
    rest, cpu = list(words), ""
    while rest and rest[0].startswith("-"):
        option = rest.pop(0)
        if option not in ("--cpu", "--cpu=force"):
            raise ConfigurationError(
                f"unknown option {option} before the script; megamem.run knows --cpu and "
                "--cpu=force, all other flags go after the script's path"
            )
        cpu = option
    if not rest:
        raise ConfigurationError(
            "no script given; write: python -m megamem.run [--cpu] SCRIPT ARGUMENTS..."
        )
    if not Path(rest[0]).is_file():
        raise ConfigurationError(
            f"no script at {rest[0]} (looked from {Path.cwd()}); give the path of a training "
            "script, such as pretrain_gpt.py of a Megatron-LM checkout"
        )
    return Command(rest[0], rest[1:], cpu=bool(cpu), force_cpu=cpu == "--cpu=force")


def attach() -> None:
    """What a patched script calls before it imports Megatron: the hooks, and errors in one line."""
    from megamem.integration import hooks
    from megamem.integration.patching import replace

    hooks.install()
    replace(sys, "excepthook", _say_in_one_line)


def _say_in_one_line(original: Callable[..., None]) -> Callable[..., None]:
    def excepthook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        try:
            if isinstance(error, ConfigurationError):
                stop(str(error))
            say_if_lost(error, original)
        except SystemExit as leaving:
            end_process(leaving, original)
            raise
        # shows the error where it does not return
        end_process(error, original)
        original(kind, error, trace)

    return excepthook


def set_rendezvous_defaults() -> None:
    """One process without torchrun is a world of one rank."""
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        return
    world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    # a port of the system's choice, taken when it is needed: one chosen here might be gone by then
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in (world | address).items():
        os.environ.setdefault(name, value)


def use_helpers_of_the_wheel() -> None:
    """megatron-core's wheel holds the compiled dataset helpers, but not the Makefile that Megatron
    runs at every start; only a checkout has something to make.
    """
    import megatron.core.datasets.utils as utils

    from megamem.integration.patching import replace

    if not (Path(utils.__file__).parent / "Makefile").exists():
        replace(utils, "compile_helpers", lambda _: lambda: None)


def run_as_main(command: Command) -> None:
    """Run the script as `python SCRIPT ARGUMENTS...` would, then close its process group."""
    sys.argv = [command.script, *command.arguments]
    import_beside(command.script)
    try:
        runpy.run_path(command.script, run_name="__main__")
    except SystemExit as leaving:
        # Megatron ends a run that reached --exit-interval this way
        if leaving.code in (None, 0):
            close_process_group()
        raise
    close_process_group()


def import_beside(script: str) -> None:
    """Let modules beside the script be found first: a checkout's Megatron before an installed one.

    python -m found megamem in the working directory, which gives way; megamem stays importable.
    """
    if sys.flags.safe_path:
        return
    sys.path[0] = str(Path(script).resolve().parent)
    home = str(Path(__file__).resolve().parents[2])
    if home not in sys.path:
        sys.path.append(home)


def close_process_group() -> None:
    """Leave together: gloo's threads abort a process that ends while a peer still talks to it."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def stop(message: str) -> NoReturn:
    """Say once for all ranks why the run cannot go on, then leave.

    A rank that waited and is still here is likely alone in failing, and says so.
    """
    rank, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    if rank == 0:
        who = ""
    else:
        time.sleep(SECONDS_TO_READ if local_rank == 0 else 2 * SECONDS_TO_READ)
        who = f" (rank {rank})"
    sys.stderr.write(f"megamem: error{who}: {message}\n")
    sys.stderr.flush()
    raise SystemExit(USER_ERROR)


def friendly_parser(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The parser, whose errors are one line with a suggestion instead of a page of usage.

    Only where a flag of ours is on the command line.

    Its --help works, too: Megatron 0.19 describes a flag with a bare percent sign, on which
    argparse ends in a traceback.
    """
    for action in parser._actions:
        try:
            (action.help or "") % {**vars(action), "prog": parser.prog}
        except (ValueError, TypeError, KeyError):
            action.help = str(action.help).replace("%", "%%")

    original = parser.error

    def error(message: str) -> NoReturn:
        # a run that has nothing to do with memory gets what Megatron says
        if "--memory" not in " ".join((message, *sys.argv)):
            original(message)
        stop(message + suggestion(message, parser._option_string_actions))

    parser.error = error  # type: ignore[method-assign]
    return parser


def suggestion(message: str, known: Iterable[str]) -> str:
    """What an unknown flag was probably meant to be, in brackets; empty when nothing is near."""
    _, found, words = message.partition("unrecognized arguments:")
    if not found:
        return ""
    unknown = [word.split("=", 1)[0] for word in words.split() if re.match("--?[a-zA-Z]", word)]
    if "--cpu" in unknown:
        return " (--cpu goes before the script's path)"
    flags = list(known)
    near = [difflib.get_close_matches(flag, flags, n=1, cutoff=0.7) for flag in unknown]
    hints = list(dict.fromkeys(match for matches in near for match in matches))
    return f" (did you mean {', '.join(hints)}?)" if hints else ""
