"""Engines on the nodes of a Ray cluster. The gateway knows no Ray: each engine has a keeper beside it, a process like any engine's."""
