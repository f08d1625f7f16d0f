"""Atomic file output, file hashes, dtypes, memory and hardware; nothing here depends on adapters or models."""
