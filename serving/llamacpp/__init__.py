"""rigserve's own LLM engine, on llama.cpp's low-level API: a process of its own (``python -m serving.llamacpp``)."""
