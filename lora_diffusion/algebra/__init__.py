"""Pure functions on adapters."""
