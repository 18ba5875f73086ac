"""Simulated devices: many of them in few processes, in the protocol and through the broker that real ones use."""
