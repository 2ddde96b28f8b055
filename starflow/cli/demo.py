"""Command `starflow demo`."""

from __future__ import annotations

import argparse
import importlib.util
import os
import socket
import threading
from typing import Any

from ..errors import ConfigError
from .common import Parser, default_checkpoint, device, interrupted_by_sigterm, non_empty, non_negative

EXAMPLE = "starflow demo --open"


def add_arguments(parser: Parser) -> None:
    """Add the arguments of this command."""
    parser.add_argument(
        "--checkpoint",
        type=non_empty,
        default=(default := default_checkpoint(text=all(map(importlib.util.find_spec, ("diffusers", "transformers"))))),
        metavar="FOLDER",
        help=f"Folder of a flow or a pipeline, or the name of a bundled checkpoint. Default: {default}.",
    )
    parser.add_argument(
        "--host",
        type=non_empty,
        default="127.0.0.1",
        help="Address to listen on. Default: 127.0.0.1, which only this machine reaches.",
    )
    parser.add_argument(
        "--port",
        type=non_negative,
        default=7860,
        metavar="N",
        help="Port to listen on; 0 picks a free one. Default: 7860.",
    )
    parser.add_argument(
        "--open", action="store_true", help="Open the page in a browser. Default: print its address only."
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Serve the page until Ctrl-C; return its address."""
    port = _free_port(args.host, args.port)
    # Otherwise the libraries would download files and report usage.
    os.environ.update(HF_HUB_OFFLINE="1", GRADIO_ANALYTICS_ENABLED="False")
    from ..demo.model import DemoModel
    from ..demo.page import Page

    page = Page(DemoModel(args.checkpoint, device(args.device)))
    try:
        with interrupted_by_sigterm():
            address = page.launch(args.host, port, args.open)
            print(f"{page.model.name}: {address} (stop with Ctrl-C)", flush=True)
            threading.Event().wait()
    except KeyboardInterrupt:
        pass
    finally:
        page.blocks.close()
    return {"address": address}


def _free_port(host: str, port: int) -> int:
    """Return the port, or a free one for 0; raise ConfigError if nothing can listen there."""
    try:
        with socket.create_server((host, port)) as server:
            return server.getsockname()[1]
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--host {host} --port {port}: {reason}") from None
