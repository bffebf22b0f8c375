"""Flax modules: pure, no input or output, no config files. A module's fields are its config.

Shape letters: B batch, S sequence, N images, M noisy blocks, T tokens per image, C feature channels, D width,
h heads, g key/value heads, k head dim, V vocabulary, L layers.
"""
