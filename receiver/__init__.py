"""Durable receiver for the Clipia API's webhooks: verify, store once, save the media, forward."""

__version__ = "0.1.0"
