"""Load tests for any OpenAI-compatible server: Locust users, LLM measures, and a report that prices the tokens."""
