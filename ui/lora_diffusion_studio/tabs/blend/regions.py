"""The canvas of the Blend tab: an adapter acts where it is painted."""

from typing import Any

import gradio as gr

from lora_diffusion_studio.backend.region_masks import SIDE_PX, save_mask, set_region
from lora_diffusion_studio.backend.studio import Studio
from lora_diffusion_studio.tabs.blend.adapter_slots import parse_slots, slot_updates
from lora_diffusion_studio.tabs.blend.layout import BlendTab
from lora_diffusion_studio.tabs.handlers import QUICK, with_messages


def draw_regions(studio: Studio, blend: BlendTab) -> None:
    """Which adapter, and where."""
    with gr.Accordion("Regions: where an adapter acts", open=False):
        of = gr.Dropdown([], label="Adapter to place")
        canvas = gr.ImageEditor(
            label="Paint where it acts",
            type="pil",
            image_mode="RGBA",
            format="png",
            sources=(),
            transforms=(),
            layers=False,
            brush=gr.Brush(default_size=48, colors=["#7c3aed"], color_mode="fixed"),
            canvas_size=(SIDE_PX, SIDE_PX),
            fixed_canvas=True,
            height=360,
        )
        with gr.Row():
            use = gr.Button("Only where it is painted")
            everywhere = gr.Button("Everywhere again")

    @with_messages
    def mask(name: str | None, painted: dict[str, Any] | None, *values: Any) -> list[Any]:
        image: Any = (painted or {}).get("composite")
        if image is None:
            raise gr.Error("nothing is painted; paint where the adapter acts", print_exception=False)
        return slot_updates(set_region(parse_slots(values), name or "", save_mask(studio, image)), studio.card)

    use.click(mask, [of, canvas, *blend.table_inputs], blend.table_outputs, **QUICK)

    @with_messages
    def release(name: str | None, *values: Any) -> list[Any]:
        return slot_updates(set_region(parse_slots(values), name or "", None), studio.card)

    everywhere.click(release, [of, *blend.table_inputs], blend.table_outputs, **QUICK)

    def on_table(chosen: list[str]) -> Any:
        return gr.update(choices=chosen, value=chosen[0] if chosen else None)

    blend.chosen.change(on_table, blend.chosen, of, **QUICK)
