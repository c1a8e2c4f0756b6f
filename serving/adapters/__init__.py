"""LoRA adapters that were added while a server ran, beside those of its config."""
