"""The API's contract, over HTTP, through a real gateway, with the clients that people use.

Each test runs on every engine that declares what it needs (see ``engines.py``).
"""
