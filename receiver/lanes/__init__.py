"""All that a worker does: one module per lane, and the parts that lanes share."""
