"""Parity: prove a port, and name the layer and the cause when it is off."""
