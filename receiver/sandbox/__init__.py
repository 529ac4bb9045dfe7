"""A local Clipia: the documented API, signed webhooks and a small CDN, for development and tests."""

from receiver.sandbox.app import create_app
from receiver.sandbox.options import WITHOUT_LIMITS, SandboxOptions, Switch, switches
from receiver.sandbox.server import running

__all__ = ["WITHOUT_LIMITS", "SandboxOptions", "Switch", "create_app", "running", "switches"]
