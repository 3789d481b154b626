"""Simulated compute-in-memory: a bit-serial, bit-sliced analog array under any backbone layer."""
