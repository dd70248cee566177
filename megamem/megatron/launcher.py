"""Runs an unmodified training script with megamem's patches in place.

    [torchrun ...] python -m megamem.run [--cpu] SCRIPT ARGUMENTS...

The patches are installed first, then the script runs as __main__ as if python had started it. What
a person got wrong is said in one line, on one rank, without a traceback; everything else keeps its
traceback.
"""

import os
import runpy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamem.config import ConfigurationError
from megamem.errors import stop

USAGE = """usage: python -m megamem.run [--cpu] SCRIPT ARGUMENTS...
       torchrun --nproc-per-node N -m megamem.run [--cpu] SCRIPT ARGUMENTS...

Runs a Megatron training script, unmodified, with memory layers at its disposal.

  SCRIPT       Megatron-LM's pretrain_gpt.py, or examples/pretrain_gpt.py of megamem
  ARGUMENTS    the script's own flags, and --memory-... (SCRIPT --help lists them all)
  --cpu        train on the CPU, over gloo; for dry runs and tests. The flags that Megatron needs
               for it are set, and named.
  --cpu=force  the same on a machine that has a GPU, which stays idle
"""


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
        from megamem.megatron.reports import lost_ranks

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
            from megamem.cpu import runtime as cpu_runtime

            cpu_runtime.install(force=command.force_cpu)
        # imports Megatron, which the CPU runtime must precede
        from megamem.megatron import patches

        patches.install()
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
    from megamem.megatron.reports import lost_ranks

    if message := lost_ranks.explain(error):
        lost_ranks.finish_speaking()
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
    """What a script with the seam calls before it imports Megatron."""
    from megamem.megatron import patches
    from megamem.patching import replace

    patches.install()
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

    from megamem.patching import replace

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
