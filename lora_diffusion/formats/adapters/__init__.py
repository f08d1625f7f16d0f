"""One module for each dialect of adapter file."""
