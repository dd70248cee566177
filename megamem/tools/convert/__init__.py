"""Converters between checkpoints; `command` is the command line.

Each conversion is a function from names and tensors to names and tensors (`reference`, `upcycle`,
`export`) between a reader and a writer (`torch_dist`, `safetensors`, `reference_file`); `layout`
knows how Megatron names and lays out weights, and nobody else does.
"""
