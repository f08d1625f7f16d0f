"""The adapter gallery of the Blend tab: thumbnails of the adapters that fit the base model, with a search."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from lora_diffusion_studio.backend.studio import Studio
from lora_diffusion_studio.view_models.thumbnails import make_thumbnail

_ALL_KINDS = ("All", "")


@dataclass(frozen=True, kw_only=True)
class AdapterGallery:
    """The components of the gallery."""

    search: gr.Textbox
    kind: gr.Dropdown
    thumbnails: gr.Gallery
    names: gr.State
    """Names of the adapters that are shown, in the order of the thumbnails."""

    @property
    def outputs(self) -> list[Any]:
        """The components that `gallery_updates` changes, in its order."""
        return [self.kind, self.thumbnails, self.names]


def build_adapter_gallery(studio: Studio) -> AdapterGallery:
    """Build the gallery with the adapters that fit the default base model."""
    base = studio.config.bases[0]
    thumbnails, names = _list_thumbnails(studio, base)
    with gr.Accordion("Adapter gallery (click to add)", open=True):
        gallery = build_thumbnail_gallery(thumbnails, label="Adapter thumbnails", show_label=False)
        with gr.Row():
            search = gr.Textbox(label="Search", placeholder="Name or trigger word", scale=3, min_width=160)
            kind = gr.Dropdown([_ALL_KINDS, *_list_kinds(studio, base)], value="", label="Type", scale=1, min_width=100)
    return AdapterGallery(search=search, kind=kind, thumbnails=gallery, names=gr.State(names))


def build_thumbnail_gallery(thumbnails: list[Any], **options: Any) -> gr.Gallery:
    """Build a gallery of captioned thumbnails that can be clicked but not enlarged."""
    return gr.Gallery(
        thumbnails,
        format="jpeg",
        columns=5,
        fit_columns=False,
        height="auto",
        object_fit="cover",
        allow_preview=False,
        interactive=False,
        buttons=[],
        elem_classes="thumbnails",
        **options,
    )


def adapter_choices(studio: Studio, base: str) -> list[tuple[str, str]]:
    """Return the dropdown choices of the adapters that fit a base model: title with trigger words, and name."""
    return [
        (f"{card.title} ({', '.join(card.trigger_words)})" if card.trigger_words else card.title, card.name)
        for card in studio.list_cards(base)
    ]


def gallery_updates(studio: Studio, base: str, text: str = "", kind: str = "") -> list[Any]:
    """Return the updates of `AdapterGallery.outputs` that show the adapters of a search."""
    thumbnails, names = _list_thumbnails(studio, base, text, kind)
    return [
        gr.update(choices=[_ALL_KINDS, *_list_kinds(studio, base)]),
        gr.update(value=thumbnails, selected_index=None),
        names,
    ]


def _list_kinds(studio: Studio, base: str) -> list[tuple[str, str]]:
    kinds = sorted({kind for card in studio.list_cards(base) for kind in card.kinds})
    return [(kind, kind) for kind in kinds]


def _list_thumbnails(studio: Studio, base: str, text: str = "", kind: str = "") -> tuple[list[Any], list[str]]:
    """Return thumbnails with captions, and the names of their adapters."""
    cards = studio.list_cards(base, text, kind)
    return [(make_thumbnail(card.title, card.preview), card.title) for card in cards], [card.name for card in cards]


def add_adapter(selected: Sequence[str] | None, name: str, limit: int) -> list[str]:
    """Return the selected adapters with one more.

    Raises:
        gr.Error: If `limit` adapters are already selected.
    """
    present = list(selected or [])
    if name in present:
        return present
    if len(present) >= limit:
        raise gr.Error(f"a blend has at most {limit} adapters; remove one first", print_exception=False)
    return [*present, name]
