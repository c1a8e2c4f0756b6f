"""OpenAI's wire format: requests, responses, stream events and errors. Imports nothing else of ours."""
