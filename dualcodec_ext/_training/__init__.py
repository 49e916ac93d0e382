"""The parts of `dualcodec_ext.training`."""
