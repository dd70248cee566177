"""Memory layers for Megatron: huge key-value tables read by product-key lookup."""

__version__ = "0.1.0"
