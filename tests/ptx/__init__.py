"""The real PTX of every kernel, executed on numpy arrays."""
