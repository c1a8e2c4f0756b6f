"""rigserve's gateway beside nginx and LiteLLM's proxy, all before an engine that answers as fast as it can."""
