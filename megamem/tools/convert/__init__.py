"""Converters between checkpoints; `command` is the command line.

Each conversion is a function from names and tensors to names and tensors (`reference`, `upcycle`,
`export`). Other modules read and write files (`torch_dist`, `safetensors`, `reference_file`).
`layout` is the only module that knows Megatron's names and shapes of weights.
"""
