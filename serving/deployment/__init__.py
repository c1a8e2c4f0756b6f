"""What `rigserve init` writes: a config, and what starts the server on this machine."""
