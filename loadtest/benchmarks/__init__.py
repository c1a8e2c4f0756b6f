"""Comparisons with peers: both in one run, in turns, as a ratio of medians. Not part of the test suite."""
