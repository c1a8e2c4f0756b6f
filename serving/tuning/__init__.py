"""Which settings of a model are best on this machine: tried, measured, and compared."""
