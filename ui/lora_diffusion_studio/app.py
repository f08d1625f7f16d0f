"""The app: tabs laid out and wired to the studio, and launched for its owner alone. No decision lives here."""

from collections.abc import Callable
from functools import partial
from typing import Any

import gradio as gr

from lora_diffusion_studio.api import add_api
from lora_diffusion_studio.backend.studio import Studio
from lora_diffusion_studio.security import MOST_WAITING, check_exposure, launch_settings
from lora_diffusion_studio.tabs.adapters import draw_adapters
from lora_diffusion_studio.tabs.blend.adapter_gallery import gallery_updates
from lora_diffusion_studio.tabs.blend.generation_events import wire_blend
from lora_diffusion_studio.tabs.blend.layout import draw_blend, list_choices
from lora_diffusion_studio.tabs.blend.regions import draw_regions
from lora_diffusion_studio.tabs.compare import draw_compare
from lora_diffusion_studio.tabs.handlers import QUICK
from lora_diffusion_studio.tabs.merge import draw_merge
from lora_diffusion_studio.tabs.presets import draw_presets, list_updates
from lora_diffusion_studio.tabs.train import draw_train
from lora_diffusion_studio.theme import CSS, SHORTCUT, studio_theme

DAY_S = 86_400


def build_app(studio: Studio, *, api: bool = False) -> gr.Blocks:
    """Build the app's pages, and API endpoints if requested."""
    with gr.Blocks(title="LoRA studio", analytics_enabled=False, delete_cache=(DAY_S, DAY_S)) as app:
        if api:
            add_api(studio)  # first, as an event's name is taken from its function
        gr.Markdown("# LoRA studio\nPut adapters on the table, move their weights, look, compare, keep.")
        with gr.Tab("Blend", id="blend"):
            blend = draw_blend(studio)
            wire_blend(studio, blend)
            draw_regions(studio, blend)
        with gr.Tab("Compare", id="compare"):
            draw_compare(studio, blend)
        with gr.Tab("Presets", id="presets"):
            presets = draw_presets(studio, blend)
        with gr.Tab("Merge", id="merge"):
            draw_merge(studio, blend)
        with gr.Tab("Train", id="train"):
            draw_train(studio, blend)
        with gr.Tab("Adapters", id="adapters"):
            draw_adapters(studio, blend)

        def fresh_page() -> list[Any]:
            """What has come since the app was built."""
            base = studio.places.bases[0]
            offered = list_choices(studio, base)
            return [gr.update(choices=offered), *list_updates(studio), *gallery_updates(studio, base)]

        app.load(fresh_page, None, [blend.chosen, *presets, *blend.adapter_gallery.outputs], **QUICK)
    return app


def serve(  # noqa: PLR0913 (the command's flags)
    studio: Studio,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    password: str = "",
    api: bool = False,
    block: bool = True,
    say: Callable[[str], Any] = partial(print, flush=True),  # noqa: B008 (a pipe shows it at once too)
) -> gr.Blocks:
    """Open the studio at an address, and stay there. Raises ConfigError for one that lets others in unasked."""
    check_exposure(host, share=share, password=password)
    app = build_app(studio, api=api)
    app.queue(max_size=MOST_WAITING, default_concurrency_limit=4)
    _, url, shared = app.launch(
        server_port=port,
        quiet=True,
        prevent_thread_lock=True,
        theme=studio_theme(),
        css=CSS,
        head=SHORTCUT,
        footer_links=["settings", "api"] if api else ["settings"],
        run_history=False,
        ssr_mode=False,
        allowed_paths=[str(studio.places.output.resolve())],
        **launch_settings(host, share=share, password=password),
    )
    say(f"the studio is open at {shared or url} (Ctrl-C closes it)")
    if block:
        app.block_thread()
    return app
