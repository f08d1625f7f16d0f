"""Make adapters smaller or sparser, and extract adapters from checkpoints."""
