"""vLLM as the gateway sees it: what it honours of a request, and how it says what is asked and answered."""
