"""The regions of the Blend tab: a canvas on which the area of an adapter is painted."""

from typing import Any

import gradio as gr

from lora_diffusion_studio.backend.region_masks import MASK_PX, save_mask, set_region
from lora_diffusion_studio.backend.studio import Studio
from lora_diffusion_studio.tabs.blend.adapter_slots import parse_slots, slot_updates
from lora_diffusion_studio.tabs.blend.layout import BlendTab
from lora_diffusion_studio.tabs.handlers import QUICK, with_messages


def build_regions(studio: Studio, blend: BlendTab) -> None:
    """Build the canvas and connect its buttons."""
    with gr.Accordion("Regions (limit an adapter to a part of the image)", open=False):
        adapter = gr.Dropdown([], label="Adapter to limit")
        canvas = gr.ImageEditor(
            label="Paint the region",
            type="pil",
            image_mode="RGBA",
            format="png",
            sources=(),
            transforms=(),
            layers=False,
            brush=gr.Brush(default_size=48, colors=["#7c3aed"], color_mode="fixed"),
            canvas_size=(MASK_PX, MASK_PX),
            fixed_canvas=True,
            height=360,
        )
        with gr.Row():
            limit = gr.Button("Limit to the painted region")
            reset = gr.Button("Remove the limit")

    @with_messages
    def limit_adapter(name: str | None, painted: dict[str, Any] | None, *slot_values: Any) -> list[Any]:
        image: Any = (painted or {}).get("composite")
        if image is None:
            raise gr.Error("the mask is empty; paint the area where the adapter is applied", print_exception=False)
        slots = set_region(parse_slots(slot_values), name or "", save_mask(studio, image))
        return slot_updates(slots, studio.get_card)

    limit.click(limit_adapter, [adapter, canvas, *blend.slot_inputs], blend.slot_outputs, **QUICK)

    @with_messages
    def reset_adapter(name: str | None, *slot_values: Any) -> list[Any]:
        return slot_updates(set_region(parse_slots(slot_values), name or "", None), studio.get_card)

    reset.click(reset_adapter, [adapter, *blend.slot_inputs], blend.slot_outputs, **QUICK)

    def list_adapters(names: list[str]) -> Any:
        choices = [(name.removesuffix(".safetensors"), name) for name in names]
        return gr.update(choices=choices, value=names[0] if names else None)

    blend.adapters.change(list_adapters, blend.adapters, adapter, **QUICK)
