"""Pretrained weights in and out: each family a table of names, read in both directions."""
