"""The load generator itself: how much it can take in, and whether others measure the same."""
