"""One module for each command or group of commands; none is imported before its command is called."""
