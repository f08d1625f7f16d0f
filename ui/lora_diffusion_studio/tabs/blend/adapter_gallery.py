"""The shelf of the Blend tab: cards of the adapters that fit, to be searched and put on the table."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from lora_diffusion_studio.backend.studio import Studio
from lora_diffusion_studio.view_models.adapter_card import make_thumbnail

KINDS_ANY = ("any", "")


@dataclass(frozen=True, kw_only=True)
class AdapterGallery:
    """The gallery of adapters with its search."""

    text: gr.Textbox
    kind: gr.Dropdown
    cards: gr.Gallery
    names: gr.State
    """Of the adapters whose cards are shown, in their order."""

    @property
    def outputs(self) -> list[Any]:
        """The components of the gallery, in the order of `gallery_updates`."""
        return [self.kind, self.cards, self.names]


def draw_gallery(studio: Studio) -> AdapterGallery:
    """Draw a search field and the matching adapters."""
    base = studio.places.bases[0]
    pictures, names = list_cards(studio, base)
    with gr.Accordion("Shelf: click a card to put it on the table", open=True):
        cards = card_gallery(pictures, label="Cards", show_label=False, elem_classes="shelf")
        with gr.Row():
            text = gr.Textbox(label="Search", placeholder="names and trigger words", scale=3, min_width=160)
            kind = gr.Dropdown([KINDS_ANY, *list_kinds(studio, base)], value="", label="Kind", scale=1, min_width=100)
    return AdapterGallery(text=text, kind=kind, cards=cards, names=gr.State(names))


def card_gallery(pictures: list[Any], **shown: Any) -> gr.Gallery:
    """Pictures with names under them, of which one is clicked."""
    return gr.Gallery(
        pictures,
        format="jpeg",
        columns=5,
        fit_columns=False,
        height="auto",
        object_fit="cover",
        allow_preview=False,
        interactive=False,
        buttons=[],
        **shown,
    )


def list_kinds(studio: Studio, base: str) -> list[tuple[str, str]]:
    """List the kinds of adapters that fit a base."""
    found = sorted({kind for card in studio.cards(base) for kind in card.kinds})
    return [(kind, kind) for kind in found]


def list_cards(studio: Studio, base: str, text: str = "", kind: str = "") -> tuple[list[Any], list[str]]:
    """Return pictures with captions, and the adapters they stand for."""
    found = studio.cards(base, text, kind)
    pictures = [(make_thumbnail(card.title, card.preview), card.title) for card in found]
    return pictures, [card.name for card in found]


def gallery_updates(studio: Studio, base: str, text: str = "", kind: str = "") -> list[Any]:
    """Return the current content of the gallery."""
    pictures, names = list_cards(studio, base, text, kind)
    return [
        gr.update(choices=[KINDS_ANY, *list_kinds(studio, base)]),
        gr.update(value=pictures, selected_index=None),
        names,
    ]


def add_picked(chosen: Sequence[str] | None, name: str, most: int) -> list[str]:
    """Return the chosen adapters and one more. Raises gr.Error if there is no free slot."""
    present = list(chosen or [])
    if name in present:
        return present
    if len(present) >= most:
        raise gr.Error(f"the table has {most} places; take an adapter off first", print_exception=False)
    return [*present, name]
