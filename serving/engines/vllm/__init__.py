"""vLLM, in an environment of its own: made by `rigserve engines install vllm`, launched, and its failures explained."""
