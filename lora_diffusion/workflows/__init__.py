"""One function for each task of a user, shared by the command line and the studio."""
