"""F0: errors, log lines, the clock. Imports nothing of moetrain."""
