"""Triton kernels, one file an op; imported only when the ``triton`` backend is used."""
