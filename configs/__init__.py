"""What to run: one file per run, read by `clipflow COMMAND --config=configs/NAME.py`."""
