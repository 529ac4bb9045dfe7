"""Tools for agents over the Model Context Protocol; each is a view over a method of `receiver.client`.

`table` has all tools, `http` serves them at `/mcp` of the internal API, and `stdio` to the program that
started `receiver mcp`. Only `server` and `stdio` import the SDK, so a process whose tools are not used never
does.
"""
