"""Makes torch behave as on a machine with a GPU, with every tensor in host memory.

Megatron's training loop names the device "cuda", asks torch.cuda for streams, random states and
memory figures, and compares the type names of tensors. Here tensors for "cuda" are made on the CPU,
and torch.cuda answers like an idle device without streams.
"""

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from megamem.patching import replace, require

CPU = torch.device("cpu")
HOST_BYTES = 16 << 30  # torch.cuda reports this as device memory, which Megatron only prints

# A TorchFunctionMode would be shorter, but it is not active while autograd runs a backward
# function, in which recomputation makes tensors.
FACTORIES = (
    *("tensor", "as_tensor", "empty", "zeros", "ones", "full", "rand", "randn", "randint"),
    *("randperm", "arange", "linspace", "eye", "empty_strided", "empty_like", "zeros_like"),
    *("ones_like", "full_like", "rand_like", "randn_like", "randint_like"),
)
TENSOR_FACTORIES = ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor")


def on_host(device: Any) -> Any:
    """The CPU if `device` is a GPU, under any of its names; otherwise `device`."""
    is_index = isinstance(device, int) and not isinstance(device, bool)
    is_name = isinstance(device, str) and device.startswith("cuda")
    is_device = isinstance(device, torch.device) and device.type == "cuda"
    return CPU if is_index or is_name or is_device else device


def redirect_tensors() -> None:
    """From now on, make tensors that are created on or moved to "cuda" on the CPU."""
    for name in FACTORIES:
        replace(torch, name, _with_host_device)
    for name in TENSOR_FACTORIES:
        replace(torch.Tensor, name, _with_host_device)
    replace(torch.Tensor, "to", _to_host)
    replace(torch.Tensor, "type", _type_named_as_cuda)
    for owner, name in ((torch.Tensor, "cuda"), (torch.nn.Module, "cuda")):
        replace(owner, name, lambda _: lambda self, *args, **kwargs: self)
    replace(torch.Tensor, "record_stream", lambda _: lambda self, stream: None)
    replace(torch.Tensor, "pin_memory", lambda _: lambda self, *args, **kwargs: self)


class _AnyGenerator(type(torch._C.Generator)):  # type: ignore[misc]
    """Lets generators that were made before pass for one of the class below."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, torch._C.Generator)


class Generator(torch._C.Generator, metaclass=_AnyGenerator):
    """A random generator for "cuda", or any device, that is one for the CPU."""

    def __new__(cls, device: Any = CPU) -> "Generator":
        """Make it on the CPU in place of a GPU."""
        new: Any = super().__new__
        return new(cls, device=on_host(device))


def redirect_generators() -> None:
    """From now on, make random generators for "cuda" on the CPU."""
    torch.Generator = Generator  # type: ignore[misc]


def redirect_meshes() -> None:
    """From now on, make device meshes of process groups for "cuda" on the CPU."""
    replace(DeviceMesh, "from_group", _with_host_mesh)


def _with_host_mesh(from_group: Callable) -> Callable:
    def from_group_of_hosts(group: Any, device_type: str, *args: Any, **kwargs: Any) -> DeviceMesh:
        return from_group(group, str(on_host(device_type)), *args, **kwargs)

    return from_group_of_hosts


def _with_host_device(factory: Callable) -> Callable:
    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = on_host(kwargs["device"])
        return factory(*args, **kwargs)

    return on_cpu


def _to_host(to: Callable) -> Callable:
    def to_cpu(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and not isinstance(args[0], torch.dtype | torch.Tensor):
            args = (on_host(args[0]), *args[1:])
        if "device" in kwargs:
            kwargs["device"] = on_host(kwargs["device"])
        return to(self, *args, **kwargs)

    return to_cpu


def _type_named_as_cuda(tensor_type: Callable) -> Callable:
    """Tensor.type() with the torch.cuda names that Megatron's mixed-precision optimizers expect."""

    def cuda_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = tensor_type(self, *args, **kwargs)
        if isinstance(result, str) and not result.startswith("torch.cuda."):
            return "torch.cuda." + result.removeprefix("torch.")
        return result

    return cuda_type


class Stream:
    """A stream on which all work is already done."""

    cuda_stream = 0
    stream_id = 0
    device = CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record()
        return event

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *error: object) -> None:
        pass


class Event:
    """An event that records the time of the host."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.time = 0.0

    def record(self, *args: Any) -> None:
        self.time = time.perf_counter()

    def wait(self, *args: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "Event") -> float:
        return (end.time - self.time) * 1e3


@contextlib.contextmanager
def _nothing(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


def _answer(value: Any) -> Callable:
    return lambda *args, **kwargs: value


def _cuda_answers() -> dict[str, Any]:
    """Name in torch.cuda -> its replacement."""
    stream = Stream()
    properties = SimpleNamespace(
        name="cpu", major=9, minor=0, total_memory=HOST_BYTES, multi_processor_count=1, warp_size=32
    )
    return {
        "is_available": _answer(True),
        "is_initialized": _answer(True),
        "device_count": _answer(1),
        "current_device": _answer(0),
        "set_device": _answer(None),
        "synchronize": _answer(None),
        "empty_cache": _answer(None),
        "ipc_collect": _answer(None),
        "current_stream": _answer(stream),
        "default_stream": _answer(stream),
        "set_stream": _answer(None),
        "stream": _nothing,
        "device": _nothing,
        "Stream": Stream,
        "Event": Event,
        "is_current_stream_capturing": _answer(False),
        "get_device_capability": _answer((9, 0)),
        "get_device_properties": _answer(properties),
        "get_device_name": _answer("cpu"),
        "memory_allocated": _answer(0),
        "max_memory_allocated": _answer(0),
        "memory_reserved": _answer(0),
        "max_memory_reserved": _answer(0),
        "reset_peak_memory_stats": _answer(None),
        "memory_stats": lambda *args, **kwargs: defaultdict(int),
        "mem_get_info": _answer((HOST_BYTES // 2, HOST_BYTES)),
        # torch.manual_seed calls both of these, so the first must not call torch.manual_seed
        "manual_seed": lambda seed: torch.default_generator.manual_seed(int(seed)),
        "manual_seed_all": _answer(None),
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "_lazy_call": lambda call, **kwargs: call(),
        "_lazy_init": _answer(None),
    }


def stand_in_for_cuda() -> None:
    """Let torch.cuda answer like one idle device whose random state is that of the CPU."""
    answers = _cuda_answers()
    for name, value in answers.items():
        require(torch.cuda, name)
        setattr(torch.cuda, name, value)
    for name in ("get_rng_state", "set_rng_state"):
        require(torch.cuda.random, name)
        setattr(torch.cuda.random, name, answers[name])
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, _answer(None))
    torch.cuda.nvtx.range = _nothing
    torch._C._cuda_setRNGState = answers["set_rng_state"]  # type: ignore[attr-defined]
    # optimizers ask torch.accelerator about graph capture; it must report no accelerator
    torch.accelerator.is_available = _answer(False)
    torch.accelerator.current_stream = _answer(SimpleNamespace(is_capturing=_answer(False)))


def accept_tensor_splits() -> None:
    """Let all_to_all_single accept split sizes as tensors, which Megatron converts only on GPUs."""

    def make(all_to_all_single: Callable) -> Callable:
        def with_list_splits(
            output: torch.Tensor,
            input: torch.Tensor,
            output_split_sizes: Any = None,
            input_split_sizes: Any = None,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            sizes = [
                splits.tolist() if torch.is_tensor(splits) else splits
                for splits in (output_split_sizes, input_split_sizes)
            ]
            return all_to_all_single(output, input, *sizes, *args, **kwargs)

        return with_list_splits

    replace(dist, "all_to_all_single", make)
