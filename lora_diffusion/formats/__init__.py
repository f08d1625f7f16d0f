"""Read and write adapter and checkpoint files; only this package knows their key layouts."""
