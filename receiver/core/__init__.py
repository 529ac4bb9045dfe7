"""The pure core: bytes, values and `now` come in, values go out; no I/O."""
