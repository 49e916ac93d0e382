"""The host side of the Triton family. An op's module imports its kernel, and with it triton."""
