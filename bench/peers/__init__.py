"""What users would pick instead of us. `catalog.py` lists them; each is optional, and one not installed is
named."""
