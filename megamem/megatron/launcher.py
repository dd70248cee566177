"""Runs an unmodified training script with the patches of megamem installed.

    [torchrun ...] python -m megamem.run [--cpu] SCRIPT ARGUMENTS...

The patches are installed first; then the script runs as __main__, as if python had started it. A
ConfigurationError is reported in one line on one rank, without a traceback; all other exceptions
keep their traceback.
"""

import os
import re
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

Runs an unmodified Megatron training script and adds memory layers to its model. Without a
Megatron-LM checkout, use megamem's own scripts: python -m megamem.pretrain_gpt [--cpu] ARGUMENTS...
and megamem.pretrain_hybrid for hybrid models.

  SCRIPT       the path of a training script, such as pretrain_gpt.py of a Megatron-LM checkout
  ARGUMENTS    the script's own flags and the --memory-... flags; SCRIPT --help lists all of them
  --cpu        train on the CPU over gloo, for dry runs and tests. It sets the flags that Megatron
               needs for this, and prints them.
  --cpu=force  the same on a machine with a GPU, which is then not used
"""


CPU_OPTIONS = ("--cpu", "--cpu=force")
# in an installed package the scripts are inside of it; in a checkout they are beside it
HOMES_OF_SCRIPTS = tuple(Path(__file__).parents[up] / "examples" for up in (1, 2))


@dataclass(frozen=True)
class Command:
    """The parsed command line of the launcher."""

    script: str
    arguments: list[str]
    cpu: bool = False
    force_cpu: bool = False


def main(argv: Sequence[str] | None = None, *, ends_process: bool | None = None) -> int:
    """Run the script that argv names; return its exit status, or raise what the script raised.

    Args:
        argv: the arguments of the launcher; by default those of the process.
        ends_process: whether the process does nothing else, so that a rank that fails may end it
            at once; by default if argv is not given.
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


def run_own(name: str, argv: Sequence[str] | None = None) -> int:
    """Run one of megamem's own scripts as the only work of this process; return its exit status.

    Args:
        name: the file name of the script.
        argv: the script's arguments, among which --cpu may be; by default those of the process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    options = [word for word in words if word in CPU_OPTIONS]
    rest = [word for word in words if word not in CPU_OPTIONS]
    return main([*options, str(own_script(name)), *rest], ends_process=True)


def own_script(name: str) -> Path:
    """The path of one of the scripts in examples/, which the wheel of megamem holds, too."""
    there = [home / name for home in HOMES_OF_SCRIPTS if (home / name).is_file()]
    return there[0] if there else HOMES_OF_SCRIPTS[0] / name


def end_process(error: BaseException, show: Callable[..., object]) -> None:
    """End the process without waiting for other ranks; return if there are none."""
    # if it was not imported there are no other ranks, and importing it takes seconds
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
        # this imports Megatron, so the CPU runtime must be installed before
        from megamem.megatron import dataset_helpers, patches

        patches.install()
        dataset_helpers.prepare_dataset_helpers()
        run_as_main(command)
    except ConfigurationError as error:
        stop(str(error))
    except Exception as error:
        stop_without_gpu(error)
        report_if_lost(error, sys.excepthook)
        raise
    return 0


def stop_without_gpu(error: BaseException) -> None:
    """Name --cpu if this machine has no GPU and the script failed for that reason.

    Args:
        error: what the script raised.

    Raises:
        SystemExit: after the message.
    """
    if not isinstance(error, Exception) or not re.search("CUDA|NVIDIA", str(error)):
        return
    import torch

    # with --cpu, torch.cuda says that there is a GPU
    if not torch.cuda.is_available():
        stop(
            f"torch finds no GPU on this machine ({str(error).splitlines()[0]}); to run the script "
            f"on the CPU, write: python -m megamem.run --cpu {sys.argv[0]} ..."
        )


def report_if_lost(error: BaseException, show: Callable[..., object]) -> None:
    """Report that this rank ends because another rank failed, below its traceback.

    Args:
        error: what this rank raised; nothing is reported if another rank did not cause it.
        show: an excepthook, which writes the traceback.

    Raises:
        SystemExit: after the report.
    """
    from megamem.megatron.reports import lost_ranks

    if message := lost_ranks.explain(error):
        lost_ranks.finish_report()
        lost_ranks.show_with(show, error)
        stop(message)


def parse(words: Sequence[str]) -> Command:
    """Split the command line into the launcher's options, the script and the script's arguments.

    Raises:
        ConfigurationError: an option is unknown, or there is no such script.
    """
    rest, cpu = list(words), ""
    while rest and rest[0].startswith("-"):
        option = rest.pop(0)
        if option not in CPU_OPTIONS:
            raise ConfigurationError(
                f"unknown option {option} before the script; megamem.run accepts only --cpu and "
                "--cpu=force there, and all other flags go after the script's path"
            )
        cpu = option
    if not rest:
        raise ConfigurationError(
            "no script is given; write: python -m megamem.run [--cpu] SCRIPT ARGUMENTS..."
        )
    if not Path(rest[0]).is_file():
        raise ConfigurationError(
            f"there is no script {rest[0]} (relative to {Path.cwd()}); give the path of a training "
            "script, such as pretrain_gpt.py of a Megatron-LM checkout, or write python -m "
            "megamem.pretrain_gpt in place of -m megamem.run and the script"
        )
    return Command(rest[0], rest[1:], cpu=bool(cpu), force_cpu=cpu == "--cpu=force")


def attach() -> None:
    """Install the patches; a checkout with the seam calls this before it imports Megatron."""
    from megamem.megatron import patches
    from megamem.patching import replace

    patches.install()
    replace(sys, "excepthook", _report_in_one_line)


def _report_in_one_line(original: Callable[..., None]) -> Callable[..., None]:
    def excepthook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        try:
            if isinstance(error, ConfigurationError):
                stop(str(error))
            stop_without_gpu(error)
            report_if_lost(error, original)
        except SystemExit as leaving:
            end_process(leaving, original)
            raise
        # if it ends the process, it also shows the error
        end_process(error, original)
        original(kind, error, trace)

    return excepthook


def set_rendezvous_defaults() -> None:
    """Set the environment of a world of one rank, if torchrun has not set one."""
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        return
    world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    # port 0 lets the system choose one when it is needed; one chosen here might be taken by then
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in (world | address).items():
        os.environ.setdefault(name, value)


def run_as_main(command: Command) -> None:
    """Run the script as `python SCRIPT ARGUMENTS...` would, then destroy its process group."""
    sys.argv = [command.script, *command.arguments]
    import_beside(command.script)
    try:
        runpy.run_path(command.script, run_name="__main__")
    except SystemExit as leaving:
        # Megatron ends a run in this way when it reaches --exit-interval
        if leaving.code in (None, 0):
            close_process_group()
        raise
    close_process_group()


def import_beside(script: str) -> None:
    """Put the script's folder first on sys.path, so that a checkout's Megatron is found first.

    It replaces the working directory, where `python -m` may have found megamem; the folder of
    megamem is added at the end, so that megamem can still be imported. For a script in a subfolder
    of a checkout, such as tools/, the checkout comes second.
    """
    if sys.flags.safe_path:
        return
    folder = Path(script).resolve().parent
    sys.path[0] = str(folder)
    checkout = next((up for up in folder.parents if (up / "megatron" / "core").is_dir()), None)
    if checkout is not None and str(checkout) not in sys.path:
        sys.path.insert(1, str(checkout))
    own_folder = str(Path(__file__).resolve().parents[2])
    if own_folder not in sys.path:
        sys.path.append(own_folder)


def close_process_group() -> None:
    """Destroy the process group after all ranks are done.

    A thread of gloo aborts a process that ends while another rank still sends to it.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
