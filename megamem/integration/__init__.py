"""The former place of megamem.megatron, kept for checkouts that an older megamem has patched."""
