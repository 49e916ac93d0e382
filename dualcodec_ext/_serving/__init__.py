"""`dualcodec-ext serve` in parts: messages, slots that step together, metrics, connections."""
