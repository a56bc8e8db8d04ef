"""Callbacks, one concern a file; none is added unless the config names it."""
from .best_checkpoint import BestCheckpoint
from .freezing import FreezeBackbone, FreezeBatchNorm
from .gates import Gates
from .gradient_norm import GradientNorm
from .last_checkpoint import LastCheckpoint
from .progress import ProgressBar
from .progressive_size import ProgressiveSize
from .result import ResultLine
from .summary import NetworkSummary
from .throughput import Throughput
from .weight_averaging import WeightEMA

__all__ = [
    'BestCheckpoint', 'FreezeBackbone', 'FreezeBatchNorm', 'Gates', 'GradientNorm', 'LastCheckpoint', 'NetworkSummary',
    'ProgressBar', 'ProgressiveSize', 'ResultLine', 'Throughput', 'WeightEMA',
]
