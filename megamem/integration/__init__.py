"""The old home of what knows Megatron, kept for checkouts that an older megamem has patched."""
