"""How the studio looks: quiet grounds, one accent, and fonts that are already on the machine."""

import gradio as gr

FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "monospace")

CSS = """
.gradio-container { max-width: 1480px !important; margin: 0 auto !important; }
.card { border-left: 3px solid var(--primary-500); padding-left: .7rem !important; }
.grid-container { grid-template-columns: repeat(auto-fill, minmax(96px, 1fr)) !important; }
.column, .contain, .wrap { min-width: 0; }
.picture img { width: 100%; height: 100%; object-fit: contain; }
.wide .grid-container { grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)) !important; }
.about { background: none !important; padding: .2rem .6rem !important; }
.about p { color: var(--body-text-color-subdued); font-size: .85rem; margin: 0; }
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
