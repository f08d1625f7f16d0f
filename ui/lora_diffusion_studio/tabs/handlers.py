"""Settings of event handlers, and the display of errors and commands."""

import functools
import html
import inspect
import logging
import re
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import gradio as gr

from lora_diffusion.errors import LoRADiffusionError
from lora_diffusion_studio.security import MAX_QUEUE_SIZE

DEVICE: dict[str, Any] = {"concurrency_id": "device", "concurrency_limit": MAX_QUEUE_SIZE, "api_visibility": "private"}
"""Event settings for work on the device. It starts at once and waits in `backend.device_queue`."""
QUICK: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
"""Event settings for short work. It uses Gradio's queue, because Gradio shows no errors of events outside it."""
_UPLOAD_FOLDER = re.compile(r"\S*/[0-9a-f]{64}/")
"""Folder of an uploaded file. Messages show the file's name only."""
Handler = TypeVar("Handler", bound=Callable[..., Any])


@contextmanager
def errors_as_messages(escape: Callable[[str], str] = html.escape) -> Generator[None]:
    """Turn errors of the library into messages on the page.

    Args:
        escape: Conversion of the message for its display; by default to HTML.

    Raises:
        gr.Error: With the library's message, or a general message for an unexpected exception, which is logged.
    """
    try:
        yield
    except gr.Error:
        raise
    except (LoRADiffusionError, OSError) as error:
        message = _UPLOAD_FOLDER.sub("", str(error))
        raise gr.Error(escape(message), title="Error", print_exception=False) from None
    except Exception:
        logging.getLogger(__name__).exception("unexpected error in the studio")
        raise gr.Error(
            "unexpected error; the terminal in which the studio runs shows the details", print_exception=False
        ) from None


def with_messages(handler: Handler) -> Handler:
    """Return the handler, a function or generator function, with its errors turned into messages."""
    if inspect.isgeneratorfunction(handler):

        @functools.wraps(handler)
        def stream(*arguments: Any) -> Iterator[Any]:
            with errors_as_messages():
                yield from handler(*arguments)

        return stream  # type: ignore[return-value]

    @functools.wraps(handler)
    def call(*arguments: Any) -> Any:
        with errors_as_messages():
            return handler(*arguments)

    return call  # type: ignore[return-value]


def build_command_box() -> tuple[gr.Accordion, gr.Code]:
    """Build the accordion that shows a tab's equivalent command when it is opened."""
    with gr.Accordion("Show as command line", open=False) as accordion:
        code = gr.Code(
            label="Equivalent command", language="shell", interactive=False, wrap_lines=True, lines=2, max_lines=8
        )
    return accordion, code


def session_id(request: gr.Request) -> str:
    """Return the id of the browser session that sent a request."""
    return str(request.session_hash)
