"""A model in several quantizations: made, measured, and set side by side."""
