"""The end of a server in a test: its event loops leave sockets to the collector, which must not fail a later test."""

import gc
import warnings
from typing import Any


def close_quietly(app: Any) -> None:
    """Close a Gradio app, and everything that it has left."""
    app.close()
    collect_quietly()


def collect_quietly() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()
