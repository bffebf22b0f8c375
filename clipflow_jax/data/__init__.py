"""Captioned pictures: sources, text, sequences and the pipeline that makes batches."""
