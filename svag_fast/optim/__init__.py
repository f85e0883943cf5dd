"""SVAG and its adaptive variants as PyTorch optimizers."""

from svag_fast.optim.adaptive import SVAGAdam, SVAGRMSprop
from svag_fast.optim.svag import SVAG, svag_loss
from svag_fast.optim.two_batch import TwoBatchOptimizer

__all__ = ["SVAG", "SVAGAdam", "SVAGRMSprop", "TwoBatchOptimizer", "svag_loss"]
