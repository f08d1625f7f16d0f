"""Access control of the server: host and origin checks, password and upload limits.

Gradio answers requests for any host name and accepts uploads from any web page. A page in another tab could fill the
disk, or reach the server through a host name that resolves to 127.0.0.1 (DNS rebinding). Both are refused here.
"""

from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from lora_diffusion.errors import ConfigError

LOCAL_HOSTS = ("127.0.0.1", "localhost")
MAX_QUEUE_SIZE = 16
"""Maximum number of requests that wait at once."""
MAX_UPLOAD_MB = 64
MIN_PASSWORD_LENGTH = 8


class SameOriginMiddleware:
    """Refuses requests that pages of other sites send."""

    def __init__(self, app: ASGIApp) -> None:
        """Wrap an application."""
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 403 if the origin of a request is not its host."""
        headers: dict[bytes, bytes] = dict(scope.get("headers", ()))
        origin, host = (headers.get(name, b"").decode("latin-1") for name in (b"origin", b"host"))
        if scope["type"] == "http" and origin and urlsplit(origin).netloc != host:
            await PlainTextResponse("requests from other sites are refused", status_code=403)(scope, receive, send)
            return
        await self.app(scope, receive, send)


def check_exposure(host: str, *, share: bool, password: str) -> None:
    """Check that a studio that other machines can reach has a password.

    Raises:
        ConfigError: If the password is missing or too short.
    """
    if (share or host not in LOCAL_HOSTS) and len(password) < MIN_PASSWORD_LENGTH:
        flag = "--share" if share else f"--host {host}"
        raise ConfigError(
            f"{flag} lets other machines connect; give --password with {MIN_PASSWORD_LENGTH} characters or more"
        )


def launch_settings(host: str, *, share: bool, password: str, hosts: Sequence[str] = ()) -> dict[str, Any]:
    """Return the arguments of `gr.Blocks.launch` that control the access.

    Args:
        host: Address to listen on.
        share: Whether the studio has a public address.
        password: Password of the user `studio`; empty for none.
        hosts: Further host names that requests may be sent to.
    """
    allowed_hosts = ["*"] if share else [*LOCAL_HOSTS, host, *hosts]
    return {
        "server_name": host,
        "share": share,
        "auth": ("studio", password) if password else None,
        "max_file_size": f"{MAX_UPLOAD_MB}mb",
        "enable_monitoring": False,
        "show_error": False,
        "app_kwargs": {
            "docs_url": None,
            "redoc_url": None,
            "openapi_url": None,
            "middleware": [
                Middleware(TrustedHostMiddleware, allowed_hosts=allowed_hosts),
                Middleware(SameOriginMiddleware),
            ],
        },
    }
