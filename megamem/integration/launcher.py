"""What the seam of a patched checkout imports; it lives in megamem.megatron.launcher now."""

from megamem.megatron.launcher import attach

__all__ = ["attach"]
