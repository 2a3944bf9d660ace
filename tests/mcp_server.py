"""A real MCP server for the tests: `python mcp_server.py` speaks on standard input and output."""

from __future__ import annotations

import io
import os
import sys
import time
from pathlib import Path

from mcp.server.mcpserver import Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import CallToolResult
from PIL import Image as PilImage

server = MCPServer("little", version="3")


@server.tool()
def add(a: int, b: int = 1) -> str:
    """Add two numbers."""
    return f"{a} + {b} = {a + b}, with {sorted(k for k in os.environ if k.startswith('LITTLE'))}"


@server.tool()
def draw(width: int) -> list[str | Image]:
    """Draw a picture."""
    buffer = io.BytesIO()
    PilImage.new("RGB", (width, 40), "red").save(buffer, "PNG")
    return ["here:", Image(data=buffer.getvalue(), format="png"), "<|im_end|>"]


@server.tool()
def refuse() -> str:
    """Never works."""
    raise ToolError("not today")


@server.tool()
def sleep(seconds: float) -> str:
    """Take a while."""
    time.sleep(seconds)
    return "awake"


@server.tool()
async def hang() -> str:
    """Hold up the whole server."""
    time.sleep(3600)
    return "never"


@server.tool()
def hits() -> CallToolResult:
    """Search; the hits are in structured content alone."""
    return CallToolResult(content=[], structured_content={"hits": [{"built": 1931}]})


@server.tool()
def die() -> str:
    """End the server."""
    os._exit(3)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        # Lives once only: the marker is there the second time.
        marker = Path(sys.argv[1])
        if marker.exists():
            sys.exit(4)
        marker.touch()
    server.run("stdio")
