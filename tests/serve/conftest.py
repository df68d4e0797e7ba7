"""pytest registers the fixtures of tests/serving.py through this import."""

from serving import client, served_captioner, server

__all__ = ["client", "served_captioner", "server"]
