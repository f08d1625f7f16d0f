"""Measures of adapters: norms, spectra, similarity, overlap, rounding."""
