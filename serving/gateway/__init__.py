"""The front door: one process that never loads a model and never blocks."""
