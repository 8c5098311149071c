"""The command line: requant COMMAND."""
