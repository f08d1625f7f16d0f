"""The page and its server: builds the tabs and launches Gradio."""

from collections.abc import Callable
from functools import partial
from typing import Any

import gradio as gr

from lora_diffusion_studio.api import add_api
from lora_diffusion_studio.backend.studio import Studio
from lora_diffusion_studio.security import MAX_QUEUE_SIZE, check_exposure, launch_settings
from lora_diffusion_studio.tabs.adapters import build_adapters_tab
from lora_diffusion_studio.tabs.blend.adapter_gallery import adapter_choices, gallery_updates
from lora_diffusion_studio.tabs.blend.generation_events import connect_comparison, connect_generation
from lora_diffusion_studio.tabs.blend.layout import build_blend_tab
from lora_diffusion_studio.tabs.blend.regions import build_regions
from lora_diffusion_studio.tabs.blend.settings_events import connect_settings
from lora_diffusion_studio.tabs.blend.slot_events import connect_slots
from lora_diffusion_studio.tabs.compare import build_compare_tab
from lora_diffusion_studio.tabs.handlers import QUICK
from lora_diffusion_studio.tabs.merge import build_merge_tab
from lora_diffusion_studio.tabs.presets import build_presets_tab, list_updates
from lora_diffusion_studio.tabs.train import build_train_tab
from lora_diffusion_studio.theme import CSS, GENERATE_SHORTCUT, studio_theme

_DAY_S = 86_400


def build_app(studio: Studio, *, api: bool = False) -> gr.Blocks:
    """Build the page, with API endpoints if requested."""
    with gr.Blocks(title="LoRA studio", analytics_enabled=False, delete_cache=(_DAY_S, _DAY_S)) as app:
        if api:
            add_api(studio)  # first, because Gradio derives the endpoints' names from the functions' names
        gr.Markdown("# LoRA studio\nBlend LoRA adapters, compare and merge them, and train new ones.")
        with gr.Tab("Blend", id="blend"):
            blend = build_blend_tab(studio)
            build_regions(studio, blend)
            for connect in (connect_generation, connect_comparison, connect_slots, connect_settings):
                connect(studio, blend)
        with gr.Tab("Compare", id="compare"):
            build_compare_tab(studio, blend)
        with gr.Tab("Presets", id="presets"):
            presets = build_presets_tab(studio, blend)
        with gr.Tab("Merge", id="merge"):
            build_merge_tab(studio, blend)
        with gr.Tab("Train", id="train"):
            build_train_tab(studio, blend)
        with gr.Tab("Adapters", id="adapters"):
            build_adapters_tab(studio, blend)

        def refresh_lists() -> list[Any]:
            """Return the updates that show adapters and presets added since the app was built."""
            base = studio.config.bases[0]
            choices = gr.update(choices=adapter_choices(studio, base))
            return [choices, *list_updates(studio), *gallery_updates(studio, base)]

        app.load(refresh_lists, None, [blend.adapters, *presets, *blend.adapter_gallery.outputs], **QUICK)
    return app


def serve(
    studio: Studio,
    *,
    block: bool = True,
    report: Callable[[str], Any] = partial(print, flush=True),  # noqa: B008 (flushed, so that a pipe shows it at once)
) -> gr.Blocks:
    """Start the server, at the address and with the password in the studio's settings.

    Args:
        studio: The studio.
        block: Whether to wait until the server is stopped.
        report: Function that is called with the message that contains the address.

    Raises:
        ConfigError: If other machines could connect without a password.
    """
    config = studio.config
    check_exposure(config.host, share=config.share, password=config.password)
    app = build_app(studio, api=config.api)
    app.queue(max_size=MAX_QUEUE_SIZE, default_concurrency_limit=4)
    _, url, shared_url = app.launch(
        server_port=config.port,
        quiet=True,
        prevent_thread_lock=True,
        theme=studio_theme(),
        css=CSS,
        head=GENERATE_SHORTCUT,
        footer_links=["settings", "api"] if config.api else ["settings"],
        run_history=False,
        ssr_mode=False,
        allowed_paths=[str(config.output.resolve())],
        **launch_settings(config.host, share=config.share, password=config.password),
    )
    report(f"the studio is open at {shared_url or url} (Ctrl-C closes it)")
    if block:
        app.block_thread()
    return app
