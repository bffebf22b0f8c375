"""Flow matching as pure functions on arrays: the path, the solvers, guidance."""
