"""Triton kernels; each has a twin in plain torch, and nothing but speed depends on them. Triton is optional."""
