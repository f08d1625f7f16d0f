"""Folders of adapters, and how an adapter is found by path, name or hash."""
