"""Merging into a checkpoint, in any layout, and taking it out again."""

from lora_diffusion.merging.checkpoints import MergeReport, merge
from lora_diffusion.merging.recipe import RECIPE_FILE, MergeRecipe, merge_recipe

__all__ = ["RECIPE_FILE", "MergeRecipe", "MergeReport", "merge", "merge_recipe"]
