"""Triton kernels for CUDA and ROCm. Importing this package imports nothing: the modules import Triton when an
operator runs.
"""
