"""The command line in parts: options, reporting, and the codec as files see it."""
