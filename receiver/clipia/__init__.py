"""The Clipia API: its client over the official SDK, error answers, catalogue, and jobs as its requests."""
