"""One function for each task of a user; what the command line and the studio share."""
