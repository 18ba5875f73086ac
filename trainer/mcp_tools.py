"""`trainer mcp`: the tools as a server of the Model Context Protocol on standard input and output.

Standard output belongs to the protocol; whatever is to be said goes to standard error.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import Any

import anyio
from mcp.server.lowlevel import Server
from mcp.server.stdio import stdio_server
from mcp.types import TextContent, Tool, ToolAnnotations

from trainer.tools import TOOLS, Tools

NAME = "edged-trainer"
INSTRUCTIONS = (
    "The fleet's trainer. Look with query_metrics and collect_samples before you ask for a training or a rollout. "
    "What is refused says why; asking again at once changes nothing."
)


def serve(tools: Tools) -> None:
    """Answer one client until it closes standard input."""
    anyio.run(_serve, server(tools))


def server(tools: Tools) -> Server[Any, Any]:
    """The server with the five tools; a refusal is a result with `isError` and the reason as text."""
    made: Server[Any, Any] = Server(NAME, version=version("edged"), instructions=INSTRUCTIONS)

    @made.list_tools()  # type: ignore[no-untyped-call, untyped-decorator]
    async def listed() -> list[Tool]:
        return [
            Tool(
                name=each.name,
                description=each.description,
                inputSchema=each.schema,
                annotations=ToolAnnotations(readOnlyHint=not each.changes, destructiveHint=False, openWorldHint=False),
            )
            for each in TOOLS.values()
        ]

    @made.call_tool()  # type: ignore[untyped-decorator]
    async def called(name: str, arguments: dict[str, Any]) -> list[TextContent]:
        # What is raised becomes a result with isError and the message; the database is waited for in a thread.
        answer = await anyio.to_thread.run_sync(tools.call, name, arguments)
        return [TextContent(type="text", text=json.dumps(answer, default=str))]

    return made


async def _serve(made: Server[Any, Any]) -> None:
    async with stdio_server() as (incoming, outgoing):
        await made.run(incoming, outgoing, made.create_initialization_options())
