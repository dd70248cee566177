"""The seam that an older megamem inserted imports this; `megamem patch` updates such seams."""

from megamem.megatron.launcher import attach

__all__ = ["attach"]
