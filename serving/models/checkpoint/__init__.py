"""Hugging Face folders, converted to GGUF files."""

from serving.models.checkpoint.convert import Converted, convert_checkpoint

__all__ = ["Converted", "convert_checkpoint"]
