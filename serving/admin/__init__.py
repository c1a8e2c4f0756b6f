"""Commands that steer a running server through its admin API."""
