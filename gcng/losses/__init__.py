"""Losses: the criterion and its running averages."""

from gcng.losses.gcahng import GCAHNGLoss, GeneratorTerms, MetricTerms
from gcng.losses.schedule import LossAverages

__all__ = ["GCAHNGLoss", "GeneratorTerms", "LossAverages", "MetricTerms"]
