"""The rates of GPUs from which times are estimated. None of them is measured by the planner."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """One GPU, its memory and its links; rates are per second and per GPU."""

    name: str
    memory: float
    """Bytes."""
    copy: float
    """Bytes read plus bytes written by a large copy."""
    flops: float
    """Dense bf16 matrix FLOPs."""
    link: float
    """Bytes sent to GPUs of the same node."""
    network: float
    """Bytes sent to other nodes."""
    capability: tuple[int, int]
    """The compute capability, on which the choices of the kernels depend."""


HARDWARE = {
    # copy rates as others have measured them; links at about three quarters of NVLink 4's 450 GB/s
    # and nine tenths of InfiniBand NDR's 50 GB/s
    "h100": Hardware("H100", 80e9, 3.0e12, 790e12, 350e9, 45e9, (9, 0)),
    "h200": Hardware("H200", 141e9, 4.3e12, 790e12, 350e9, 45e9, (9, 0)),
    # all of these are assumed: the same fractions of NVIDIA's peak figures as for the H100
    "b200": Hardware("B200", 192e9, 7.2e12, 1800e12, 700e9, 45e9, (10, 0)),
}

ASSUMPTIONS = (
    "Times are estimates. Stages that were measured on an H100 are scaled from there by bytes and "
    "lookups, and for other GPUs by the copy rate; all else is bytes and FLOPs divided by assumed "
    "rates of H100, H200 and B200 (memory copy 3.0, 4.3 and 7.2 TB/s; bf16 790, 790 and 1800 "
    "TFLOP/s; NVLink 350, 350 and 700 GB/s; InfiniBand 45 GB/s, or --link-gbytes and "
    "--network-gbytes). Rows are read at random. The times on both links and of the stages add up; "
    "of N pieces, all but one hide the others behind the longest of inside, across and reading. No "
    "other overlap is assumed, and no other traffic of the model is counted. The wait of the host, "
    "the work of routing and the cost of a further piece are estimates that were not measured."
)
