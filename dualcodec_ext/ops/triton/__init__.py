"""The host side of the Triton family: checks, allocation, launches. An op's module imports its kernel, and so triton."""
