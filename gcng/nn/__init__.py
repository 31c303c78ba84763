"""Modules with parameters."""

from gcng.nn.graph import CorrelationGraph, GraphOutput

__all__ = ["CorrelationGraph", "GraphOutput"]
