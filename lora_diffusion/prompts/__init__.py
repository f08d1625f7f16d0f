"""Prompt syntax (emphasis and `<lora:...>` tags) and the infotext of images by A1111, Forge and ComfyUI."""
