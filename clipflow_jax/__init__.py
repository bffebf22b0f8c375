"""CLIP-Flow in JAX: one model that understands and draws images."""

__version__ = "0.1.0"
