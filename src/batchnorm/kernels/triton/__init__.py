"""The GPU backend, in Triton: kernels (stats, apply, backward, running, arithmetic), layout of the work, backend."""
