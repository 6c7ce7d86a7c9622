"""Parity: prove that a port is right; if it is not, name the layer and the cause."""
