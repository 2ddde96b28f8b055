"""starflow demo"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import threading
from typing import Any

from ..errors import ConfigError
from .common import Parser, device, non_negative

HELP = "draw on a local web page"
EXAMPLE = "starflow demo --checkpoint digits --open"


def add_arguments(parser: Parser) -> None:
    """The arguments of this command."""
    parser.add_argument(
        "--checkpoint", default="digits", help="folder of a flow or of a pipeline, or the bundled 'digits' (default)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1: this machine)")
    parser.add_argument("--port", type=non_negative, default=7860, help="default 7860; 0 takes a free one")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Serve the page until Ctrl-C."""
    port = _free_port(args.host, args.port)
    # Nothing is fetched and nothing is reported, whatever a library would do by itself.
    os.environ.update(HF_HUB_OFFLINE="1", GRADIO_ANALYTICS_ENABLED="False")
    from ..demo.page import Artist, Page

    page = Page(Artist(args.checkpoint, device(args.device)))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        address = page.launch(args.host, port, args.open)
        print(f"{page.artist.name}: {address} (Ctrl-C ends it)", flush=True)
        threading.Event().wait()
    except KeyboardInterrupt:
        pass
    finally:
        page.blocks.close()
    return {"address": address}


def _free_port(host: str, port: int) -> int:
    """The port, or a free one for 0. Raises ConfigError where nothing can listen there."""
    try:
        with socket.create_server((host, port)) as server:
            return server.getsockname()[1]
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--host {host} --port {port}: {reason}") from None
