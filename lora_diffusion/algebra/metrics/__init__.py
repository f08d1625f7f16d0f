"""Measurements of adapters: norms, spectra, subspace similarity, overlap, amplification and quantization error."""
