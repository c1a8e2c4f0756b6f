"""Backups of a server's data, and what an upgrade will do to it."""
