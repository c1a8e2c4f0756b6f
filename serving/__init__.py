"""rigserve: quantized open-weight models on gaming GPUs behind a metered, OpenAI-compatible API."""

__version__ = "0.1.0"
