"""How the app's events run, and how what the library refuses is said to a visitor."""

import functools
import html
import inspect
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import gradio as gr

from lora_diffusion.errors import LoRADiffusionError
from lora_diffusion_studio.security import MOST_WAITING

DEVICE: dict[str, Any] = {"concurrency_id": "device", "concurrency_limit": MOST_WAITING, "api_visibility": "private"}
"""Work on the device: it begins at once, and waits its turn where the device is (`rendering.py`)."""
QUICK: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
"""What is done at once. It goes through Gradio's queue, as errors of events outside it are not shown."""
UPLOADED = re.compile(r"\S*/[0-9a-f]{64}/")
"""Where an upload lies; its visitor knows it by its name."""
Work = TypeVar("Work", bound=Callable[..., Any])


@contextmanager
def errors_as_messages(written: Callable[[str], str] = html.escape) -> Iterator[None]:
    """Turn the library's errors into messages for the visitor, whose page shows them as HTML."""
    try:
        yield
    except gr.Error:
        raise
    except (LoRADiffusionError, OSError) as error:
        said = UPLOADED.sub("", str(error))
        raise gr.Error(written(said), title="That did not work", print_exception=False) from None
    except Exception:
        logging.getLogger("ui").exception("unexpected")
        raise gr.Error(
            "something unexpected went wrong; the terminal that the studio runs in says what", print_exception=False
        ) from None


def with_messages(work: Work) -> Work:
    """Wrap a handler, or a stream, so that its errors become messages."""
    if inspect.isgeneratorfunction(work):

        @functools.wraps(work)
        def streaming(*arguments: Any) -> Iterator[Any]:
            with errors_as_messages():
                yield from work(*arguments)

        return streaming  # type: ignore[return-value]

    @functools.wraps(work)
    def once(*arguments: Any) -> Any:
        with errors_as_messages():
            return work(*arguments)

    return once  # type: ignore[return-value]


def command_box(label: str) -> tuple[gr.Accordion, gr.Code]:
    """Where a tab's command-line twin is shown, when it is opened."""
    with gr.Accordion("Copy as command", open=False) as twin:
        box = gr.Code(label=label, language="shell", interactive=False, wrap_lines=True, lines=2, max_lines=8)
    return twin, box


def visitor_id(request: gr.Request) -> str:
    """Return the id of the visitor's session."""
    return str(request.session_hash)
