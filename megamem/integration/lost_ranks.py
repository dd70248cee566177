"""What to tell a person whose run ended because another rank was lost."""

import os
import re
import socket
from pathlib import Path
from typing import Any

import torch.distributed as dist

SIGNS = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|broken pipe|timed? ?out|no route to host"
    r"|unreachable|read error|remote process exited|socket error",
    re.IGNORECASE,
)
"""What gloo, NCCL and the store say when a peer is gone or silent."""


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
