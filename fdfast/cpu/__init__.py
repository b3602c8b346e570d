"""The CPU backend: one file an operation, the same names and signatures as fdfast.kernels."""
