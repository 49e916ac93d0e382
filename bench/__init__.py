"""Benchmarks: `python -m bench decode|encode|ops`, what users would pick instead in turn beside us. See
README.md."""
