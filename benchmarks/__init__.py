"""Benchmarks of gcng: providers, one shared iteration, time, memory and the tables made from the results."""
