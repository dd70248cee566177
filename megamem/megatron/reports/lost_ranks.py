"""Ends a rank that fails while other ranks are connected, at once and with a message.

When Python exits normally it destroys the process groups. NCCL then waits for ranks that are gone
or wait themselves. A wait of a minute was seen, in which no scheduler knows that the rank failed.
"""

import atexit
import contextlib
import faulthandler
import io
import logging
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

SECONDS_TO_TIDY = 5.0
"""Time that functions registered with atexit, such as those of wandb, get before the end."""

INTERRUPTED = 130
"""The exit status that shells give a process that Ctrl-C ended."""

SIGNS = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|broken pipe|timed? ?out|no route to host"
    r"|unreachable|read error|remote process exited|socket error",
    re.IGNORECASE,
)
"""Words in the errors of gloo, NCCL and the store when another rank is gone or silent."""


def end_process(error: BaseException, show: Callable[..., object]) -> None:
    """End the process at once, with the output and exit status that Python has for this error.

    Returns if no other ranks are connected, or if the error is SystemExit with status 0.

    Args:
        error: the exception that ends the process.
        show: an excepthook, which is called unless the error is a SystemExit.
    """
    if not is_connected():
        return
    if isinstance(error, SystemExit):
        if isinstance(error.code, str):
            sys.stderr.write(f"{error.code}\n")
        status = 0 if error.code is None else 1
        status = error.code if isinstance(error.code, int) else status
        if status != 0:
            leave(status)
    else:
        show_with(show, error)
        leave(INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1)


def finish_report() -> None:
    """Let the first rank finish its report although torchrun is ending it.

    torchrun sends SIGTERM to all ranks a tenth of a second after one has died. The first rank
    ignores it and reports at once. The other ranks wait before they report, so the signal ends them
    first.
    """
    if dist.get_rank() == 0 and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def show_with(show: Callable[..., object], error: BaseException) -> None:
    """Call an excepthook; print the traceback if the hook itself fails."""
    try:
        show(type(error), error, error.__traceback__)
    except Exception:
        traceback.print_exception(error)


def is_connected() -> bool:
    """Whether there are process groups of several ranks, and the process is not in a debugger."""
    if sys.gettrace() is not None or sys.flags.interactive:
        return False
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def leave(status: int) -> NoReturn:
    """Flush all output and end this process now.

    Functions registered with atexit still run, for at most SECONDS_TO_TIDY.
    """
    _flush()
    # this timer ends the process even if a function at exit never releases the interpreter lock
    with open(os.devnull, "w") as nowhere:
        faulthandler.dump_traceback_later(2 * SECONDS_TO_TIDY, exit=True, file=nowhere)
        tidying = threading.Thread(target=atexit._run_exitfuncs, daemon=True)
        tidying.start()
        tidying.join(SECONDS_TO_TIDY)
        for child in multiprocessing.active_children():
            child.terminate()
        _flush()
        os._exit(status)


def _flush() -> None:
    """Flush logs, TensorBoard and the standard streams."""
    with contextlib.suppress(Exception):
        for handler in logging.root.handlers:
            handler.flush()
    with contextlib.suppress(Exception):
        from megatron.training import get_tensorboard_writer

        if writer := get_tensorboard_writer():
            writer.flush()
    with contextlib.suppress(Exception):
        # torch's excepthook redirects stderr to a buffer, which it would print only later
        if isinstance(sys.stderr, io.StringIO) and sys.__stderr__ is not None:
            sys.__stderr__.write(sys.stderr.getvalue())
            sys.stderr = sys.__stderr__
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def explain(error: BaseException) -> str | None:
    """A message about a lost rank and how to resume, or None if the error has another cause.

    The backends of torch.distributed raise plain RuntimeErrors, which are recognised by their text.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    if not isinstance(error, RuntimeError):
        return None
    reason = _first_sentence(str(error)) or type(error).__name__
    if not isinstance(error, dist.DistError) and not SIGNS.search(reason):
        return None
    return (
        f"rank {dist.get_rank()} of {dist.get_world_size()} on {socket.gethostname()} stopped "
        f"because a collective failed ({reason}). Another rank has died or did not answer within "
        f"--distributed-timeout-minutes{_timeout()}. Look for the cause in the log of the rank "
        f"that failed first; if there is none, check its host and its network. {_how_to_resume()}"
    )


def _first_sentence(message: str) -> str:
    """The first sentence of a message, without the source location of a backend."""
    first = (message.strip().splitlines() or [""])[0]
    return re.sub(r"^\[.*?:\d+\] ", "", first).split(". ")[0].rstrip(".")


def _args() -> Any:
    from megatron.training import get_args

    try:
        return get_args()
    except AssertionError:  # Megatron has not parsed its command line yet
        return None


def _timeout() -> str:
    minutes = getattr(_args(), "distributed_timeout_minutes", None)
    return f" {minutes}" if minutes is not None else ""


def _how_to_resume() -> str:
    """From which iteration the run can resume, as a sentence."""
    folder = getattr(_args(), "save", None)
    if not folder:
        return "The run cannot resume, because --save was not given."
    tracker = Path(folder) / "latest_checkpointed_iteration.txt"
    if not tracker.is_file():
        return f"The run cannot resume, because --save {folder} holds no checkpoint yet."
    load = getattr(_args(), "load", None)
    same = load is not None and os.path.realpath(load) == os.path.realpath(folder)
    command = "The same command" if same else f"The same command with --load {folder}"
    return f"{command} resumes after iteration {tracker.read_text().strip()}."
