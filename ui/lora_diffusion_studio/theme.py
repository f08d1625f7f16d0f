"""The look of the page: theme, CSS, and the keyboard shortcut of Generate."""

import gradio as gr

FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
MONO_FONTS = ("ui-monospace", "SFMono-Regular", "Menlo", "monospace")
"""Fonts of the operating system, so that the page loads nothing from other servers."""

CSS = """
.gradio-container { max-width: 1480px !important; margin: 0 auto !important; }
.gradio-container, .gradio-container > main { width: 100% !important; }
.column, .contain, .wrap { min-width: 0; }
.grid-container { grid-template-columns: repeat(auto-fill, minmax(96px, 1fr)) !important; }
.fit-image img { width: 100%; height: 100%; object-fit: contain; }
.compact-gallery .grid-wrap { padding-top: 2.4rem; }
.compact-gallery .grid-wrap, .thumbnails .grid-wrap { min-height: 0 !important; max-height: 300px; }
.thumbnails .grid-container { grid-template-columns: repeat(auto-fill, minmax(84px, 104px)) !important; }
.thumbnails .caption-label {
  left: 3px; right: 3px; bottom: 3px; max-width: none; padding: .1rem .2rem; text-align: center; font-size: .75rem;
}
.plots .grid-container { grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)) !important; }
.plots .grid-wrap { max-height: none !important; padding-top: 2.4rem; }
.plots .gallery-item, .plots .gallery-item > * { aspect-ratio: 8 / 5 !important; height: auto; }
.wrapped-table td { overflow-wrap: anywhere; }
.adapter-slot { border-left: 3px solid var(--primary-500); }
.adapter-slot > .adapter-slot { border-left: 0; }
.adapter-slot .column { padding: .4rem; gap: .2rem; justify-content: center; }
.adapter-slot .column > .block { padding: 0; }
.adapter-slot .row { gap: 0; background: var(--block-background-fill); }
.adapter-slot .thumbnail { flex: 0 0 84px !important; padding: .4rem; }
.adapter-slot .thumbnail img { border-radius: 6px; }
.adapter-slot .summary {
  color: var(--body-text-color-subdued); font-size: .85rem; padding: 0 !important; border: 0 !important;
}
.trigger-words { padding: .2rem .6rem .5rem !important; }
.trigger-words label { padding: .1rem .6rem !important; }
.trigger-words input { display: none; }
#status p { margin: 0; min-height: 1.4em; }
@media (max-width: 640px) { .gradio-container { padding: .5rem !important; } }
"""
GENERATE_SHORTCUT = """
<script>
document.addEventListener("keydown", (event) => {
  if ((event.ctrlKey || event.metaKey) && event.key === "Enter") {
    document.activeElement?.blur();
    setTimeout(() => document.getElementById("generate")?.click(), 60);
  }
});
</script>
"""
"""Script that generates on Ctrl+Enter. It leaves the focused field first, so that Gradio reads its text."""


def studio_theme() -> gr.themes.Base:
    """Return the theme, for light and dark mode."""
    return gr.themes.Soft(
        primary_hue="violet", secondary_hue="slate", neutral_hue="slate", font=list(FONTS), font_mono=list(MONO_FONTS)
    )
