"""Triton kernels, packaged as fastcap.kernels. Imports torch and triton only."""
