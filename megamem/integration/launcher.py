"""What the seam of an older megamem imports; `megamem patch` renews such seams."""

from megamem.megatron.launcher import attach

__all__ = ["attach"]
