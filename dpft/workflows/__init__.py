"""One function for each command: the command line parses and prints, and Python calls the same."""
