"""rigserve's llama.cpp engine beside its peers: llama-server, llama-cpp-python's example server, llama-batched-bench."""
