"""User tasks on adapter files: analyze, combine, convert, extract, inspect, pack, prune, verify."""
