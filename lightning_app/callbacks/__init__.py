"""Callbacks, one concern a file; none is added unless the config names it."""
from .progress import ProgressBar
from .result import ResultLine
from .summary import NetworkSummary
from .throughput import Throughput
from .weight_averaging import WeightEMA

__all__ = ['NetworkSummary', 'ProgressBar', 'ResultLine', 'Throughput', 'WeightEMA']
