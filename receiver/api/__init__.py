"""HTTP: the callback and the operations endpoints."""
