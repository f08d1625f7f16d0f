"""How the studio looks: quiet grounds, one accent, and fonts that are already on the machine."""

import gradio as gr

FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "monospace")

CSS = """
.gradio-container { max-width: 1480px !important; margin: 0 auto !important; }
.card { border-left: 3px solid var(--primary-500); }
.card > .card { border-left: 0; }
.grid-container { grid-template-columns: repeat(auto-fill, minmax(96px, 1fr)) !important; }
.column, .contain, .wrap { min-width: 0; }
.picture img { width: 100%; height: 100%; object-fit: contain; }
.wide .grid-container { grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)) !important; }
.wide .grid-wrap { max-height: none !important; padding-top: 2.4rem; }
.wide .gallery-item, .wide .gallery-item > * { aspect-ratio: 8 / 5 !important; height: auto; }
.facts td { overflow-wrap: anywhere; }
.gradio-container, .gradio-container > main { width: 100% !important; }
.about { color: var(--body-text-color-subdued); font-size: .85rem; padding: 0 !important; border: 0 !important; }
.card .column { padding: .4rem; gap: .2rem; justify-content: center; }
.card .column > .block { padding: 0; }
.card .row { gap: 0; background: var(--block-background-fill); }
.face { flex: 0 0 84px !important; padding: .4rem; }
.face img { border-radius: 6px; }
.words { padding: .2rem .6rem .5rem !important; }
.words label { padding: .1rem .6rem !important; }
.words input { display: none; }
.tidy .grid-wrap { padding-top: 2.4rem; }
.tidy .grid-wrap, .shelf .grid-wrap { min-height: 0 !important; max-height: 300px; }
.shelf .grid-container { grid-template-columns: repeat(auto-fill, minmax(84px, 104px)) !important; }
.shelf .caption-label {
  left: 3px; right: 3px; bottom: 3px; max-width: none; padding: .1rem .2rem; text-align: center; font-size: .75rem;
}
#status p { margin: 0; min-height: 1.4em; }
@media (max-width: 640px) { .gradio-container { padding: .5rem !important; } }
"""
SHORTCUT = """
<script>
document.addEventListener("keydown", (event) => {
  if ((event.ctrlKey || event.metaKey) && event.key === "Enter") {
    document.activeElement?.blur();
    setTimeout(() => document.getElementById("generate")?.click(), 60);
  }
});
</script>
"""
"""Ctrl+Enter generates; leaving the field first makes its text known."""


def studio_theme() -> gr.themes.Base:
    """The theme, light and dark."""
    return gr.themes.Soft(
        primary_hue="violet", secondary_hue="slate", neutral_hue="slate", font=list(FONTS), font_mono=list(MONO)
    )
