"""The compute, one folder per op, in every language; `dualcodec_ext.ops` calls it."""
