"""A policy's attempts at benchmarks: what is kept of each, and what all of them come to."""
