"""A rank whose run ends while other ranks are connected: what it says, and that it leaves at once.

Python's way out takes process groups down. NCCL waits there for ranks that are gone or that wait
themselves: a minute was seen, in which no scheduler knows that the rank has failed.
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
"""What functions that run at exit are given, such as those of wandb, before the process ends."""

INTERRUPTED = 130
"""What shells say of a process that Ctrl-C ended."""

SIGNS = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|broken pipe|timed? ?out|no route to host"
    r"|unreachable|read error|remote process exited|socket error",
    re.IGNORECASE,
)
"""What gloo, NCCL and the store say when a peer is gone or silent."""


def end_process(error: BaseException, show: Callable[..., object]) -> None:
    """Leave at once, as Python would have for this error; return where no ranks are connected.

    Args:
        show: an excepthook, for what is not a SystemExit.
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


def finish_speaking() -> None:
    """Let the first rank say what it has to say, which it does at once, though it is being ended.

    torchrun tells all ranks to end a tenth of a second after one has died. The other ranks wait
    before they speak, so that this is what silences them.
    """
    if dist.get_rank() == 0 and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def show_with(show: Callable[..., object], error: BaseException) -> None:
    """Call an excepthook, which may be anybody's."""
    try:
        show(type(error), error, error.__traceback__)
    except Exception:
        traceback.print_exception(error)


def is_connected() -> bool:
    """Whether there are process groups of several ranks, and nobody looks on in a debugger."""
    if sys.gettrace() is not None or sys.flags.interactive:
        return False
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def leave(status: int) -> NoReturn:
    """End this process now, with what it has said where it belongs.

    What was registered to run at exit does run, for SECONDS_TO_TIDY.
    """
    _flush()
    # a function that holds on to the interpreter would hold this one up, too, but not this timer
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
    """Standard streams, logs, TensorBoard."""
    with contextlib.suppress(Exception):
        for handler in logging.root.handlers:
            handler.flush()
    with contextlib.suppress(Exception):
        from megatron.training import get_tensorboard_writer

        if writer := get_tensorboard_writer():
            writer.flush()
    with contextlib.suppress(Exception):
        # torch's excepthook collects what the one before it says, and would print it afterwards
        if isinstance(sys.stderr, io.StringIO) and sys.__stderr__ is not None:
            sys.__stderr__.write(sys.stderr.getvalue())
            sys.stderr = sys.__stderr__
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def explain(error: BaseException) -> str | None:
    """What happened and how to go on, or None where the error is about something else.

    The backends of torch.distributed raise plain RuntimeErrors, known by their words.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    if not isinstance(error, RuntimeError):
        return None
    said = _essence(str(error)) or type(error).__name__
    if not isinstance(error, dist.DistError) and not SIGNS.search(said):
        return None
    return (
        f"rank {dist.get_rank()} of {dist.get_world_size()} on {socket.gethostname()} stopped: a "
        f"collective failed ({said}). Another rank has died or cannot be reached within "
        f"--distributed-timeout-minutes{_timeout()}: the log of the rank that failed first says "
        f"why, or, where it says nothing, its host and its network. {_way_on()}"
    )


def _essence(message: str) -> str:
    """The first sentence, without the place in a backend's source."""
    first = (message.strip().splitlines() or [""])[0]
    return re.sub(r"^\[.*?:\d+\] ", "", first).split(". ")[0].rstrip(".")


def _args() -> Any:
    from megatron.training import get_args

    try:
        return get_args()
    except AssertionError:  # Megatron has not read its command line yet
        return None


def _timeout() -> str:
    minutes = getattr(_args(), "distributed_timeout_minutes", None)
    return f" {minutes}" if minutes is not None else ""


def _way_on() -> str:
    """Where the run would go on from."""
    folder = getattr(_args(), "save", None)
    if not folder:
        return "Without --save there is nothing to go on from."
    tracker = Path(folder) / "latest_checkpointed_iteration.txt"
    if not tracker.is_file():
        return f"There is no checkpoint in --save {folder} yet."
    load = getattr(_args(), "load", None)
    same = load is not None and os.path.realpath(load) == os.path.realpath(folder)
    command = "The same command" if same else f"The same command with --load {folder}"
    return f"{command} goes on after iteration {tracker.read_text().strip()}."
