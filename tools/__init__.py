"""Set-up of a clone, before anything is installed: standard library only. `api_docs` is for afterwards."""
