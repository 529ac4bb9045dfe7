"""The table of tools, and the part of it that an agent has."""

from collections.abc import Collection
from typing import Final

from receiver.mcp.actions import ACTION_TOOLS
from receiver.mcp.generation import GENERATION_TOOLS
from receiver.mcp.on_call import ON_CALL_TOOLS
from receiver.mcp.tool import Tool
from receiver.setting_fields import Scope

TOOLS: Final = (*GENERATION_TOOLS, *ON_CALL_TOOLS, *ACTION_TOOLS)


def tools_for(scopes: Collection[Scope], *, allow_write: bool) -> list[Tool]:
    """Return the tools of an agent; for it, there are no others."""
    return [tool for tool in TOOLS if tool.scope in scopes and (allow_write or not tool.acts)]
