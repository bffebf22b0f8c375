"""The loop and what it needs: state, optimizer, step, checkpoints, metrics."""
