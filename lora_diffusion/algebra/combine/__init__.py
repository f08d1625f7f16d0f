"""Combine several adapters into one: exact sums and consensus methods such as TIES, DARE and ZipLoRA."""
