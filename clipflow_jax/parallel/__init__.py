"""The device mesh and what is sharded over it."""
