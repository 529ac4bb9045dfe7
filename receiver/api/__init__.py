"""The HTTP endpoints: Clipia's callback, the internal API, health checks and metrics."""
