"""The command line: one file a command, their shared options and output, and the one error boundary."""
