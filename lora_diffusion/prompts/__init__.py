"""Notation of prompts, tags of adapters, and what other programs write into pictures."""
