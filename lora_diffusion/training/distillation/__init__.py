"""Distillation of a blend into one adapter."""
