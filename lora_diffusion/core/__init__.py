"""Files, number types, memory and hardware. Knows nothing of adapters."""
