"""Samplers for Optuna that need nothing else of tuner's: a package in the form that OptunaHub asks for."""

from .sampler import (
    GridSampler,
    Observed,
    PointSampler,
    QuasiRandomSampler,
    RandomSampler,
    RankGPSampler,
    RankTPESampler,
    Request,
)

__all__ = [
    "GridSampler",
    "Observed",
    "PointSampler",
    "QuasiRandomSampler",
    "RandomSampler",
    "RankGPSampler",
    "RankTPESampler",
    "Request",
]
