"""Loaded bases: pipelines, text encoding, quantized weights. The home of diffusers and transformers."""
