"""A process that serves one way of a subject: python -m clipflow_jax.bench.serving MODULE:FUNCTION."""

import pkgutil
import sys

from clipflow_jax.bench import frame

if __name__ == "__main__":
  frame.serve(pkgutil.resolve_name(sys.argv[1]))
