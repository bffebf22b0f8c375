"""How fast the work of this package is on this machine, alone or in turns with other programs that do the same."""
