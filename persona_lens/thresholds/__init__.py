"""Thresholds for monitors: calibrated on benign chats, tried on chats that show the trait, kept beside the vector.

    benign    = monitor(model, chats, vector)
    threshold = calibrate_threshold(projections, vector=vector, chats=names)      # the 95th percentile
    detection(positive, negative).rates(threshold)                                # what it catches
    save_thresholds("runs/evil", [threshold])

Knows nothing about models or chats: projections (arXiv:2507.21509, section 3.3) come in, numbers go out.
"""

from persona_lens.thresholds.files import load_thresholds, save_thresholds
from persona_lens.thresholds.roc import Detection, Rates, RocPoint, detection
from persona_lens.thresholds.threshold import Threshold, calibrate_threshold

__all__ = [
    "Detection",
    "Rates",
    "RocPoint",
    "Threshold",
    "calibrate_threshold",
    "detection",
    "load_thresholds",
    "save_thresholds",
]
