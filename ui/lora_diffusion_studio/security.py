"""What keeps a studio on one machine its owner's: who may ask, from which page, and how much.

Gradio answers any Host and takes uploads from any web page; a page in another tab could fill the disk, or reach the app
by a name that turns to 127.0.0.1. Both are refused here.
"""

from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from lora_diffusion.errors import ConfigError

LOCAL = ("127.0.0.1", "localhost")
MOST_WAITING = 16
UPLOAD_MB = 64


class SameOrigin:
    """Refuses what a page of another site sends."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope.get("headers", ()))
        origin, host = (headers.get(name, b"").decode("latin-1") for name in (b"origin", b"host"))
        if scope["type"] == "http" and origin and urlsplit(origin).netloc != host:
            await PlainTextResponse("requests from other sites are refused", status_code=403)(scope, receive, send)
            return
        await self.app(scope, receive, send)


def check_exposure(host: str, *, share: bool, password: str) -> None:
    """Raise ConfigError for a studio that others could reach without a password."""
    if (share or host not in LOCAL) and len(password) < 8:
        where = "--share" if share else f"--host {host}"
        raise ConfigError(f"{where} lets others in; give --password with 8 characters or more")


def launch_settings(host: str, *, share: bool, password: str, hosts: Sequence[str] = ()) -> dict[str, Any]:
    """What `launch` needs to hold to this."""
    allowed = ["*"] if share else [*LOCAL, host, *hosts]
    return {
        "server_name": host,
        "share": share,
        "auth": ("studio", password) if password else None,
        "max_file_size": f"{UPLOAD_MB}mb",
        "enable_monitoring": False,
        "show_error": False,
        "app_kwargs": {
            "docs_url": None,
            "redoc_url": None,
            "openapi_url": None,
            "middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=allowed), Middleware(SameOrigin)],
        },
    }
