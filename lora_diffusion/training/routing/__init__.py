"""Training of gates over frozen adapters."""
