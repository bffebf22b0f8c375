"""From a checkpoint to pictures and words."""
