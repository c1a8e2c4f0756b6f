"""Set-up of a clone, before anything is installed: standard library only."""
