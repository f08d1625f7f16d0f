"""Distillation of a blend of several adapters into one LoRA."""
