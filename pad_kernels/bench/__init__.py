"""Microbenchmarks: this library, its peers and the matrix products alone, on the same tensors.

The command is ``pad-kernels bench``; :mod:`pad_kernels.bench.runner` says what it does.
"""
