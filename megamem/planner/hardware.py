"""The rates that times are estimated with. Nothing here was measured by the planner."""

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
    """Bytes out, to GPUs of the same node."""
    network: float
    """Bytes out, to other nodes."""


HARDWARE = {
    # copies as measured by others; links at about three quarters of NVLink 4's 450 GB/s and nine
    # tenths of InfiniBand NDR's 50 GB/s
    "h100": Hardware("H100", 80e9, 3.0e12, 790e12, 350e9, 45e9),
    "h200": Hardware("H200", 141e9, 4.3e12, 790e12, 350e9, 45e9),
    # assumed throughout: H100's fractions of the figures that NVIDIA gives
    "b200": Hardware("B200", 192e9, 7.2e12, 1800e12, 700e9, 45e9),
}

ASSUMPTIONS = (
    "Times are estimates: bytes and FLOPs over assumed rates (H100 copy 3.0 TB/s, H200 4.3, B200 "
    "7.2; 790, 790, 1800 bf16 TFLOP/s; NVLink 350, 350, 700 GB/s; InfiniBand 45 GB/s), nothing "
    "overlapped, no other traffic of the model counted. A lookup is sent as 8 bytes: an id of 4 "
    "and a weight of 4."
)
