"""Chat: a conversation becomes a prompt, and generated text becomes content, reasoning and tool calls.

It knows text and JSON only, no model: what families of models want is read from their templates.
"""
