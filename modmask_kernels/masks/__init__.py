"""Mask sets: conversion of models, algebra and files of masks, learning."""

from .controls import expected_count_masks, magnitude_masks, random_masks
from .convert import mask_model, masked_layers, set_mode, unmask_model, use_set
from .exchange import export_masks, from_prune, import_masks, to_prune
from .fingerprint import weight_hash
from .learn import LearnResult, learn_masks
from .mask_set import MaskSet
from .penalties import Annealing, expected_l0
from .presets import PRESETS, preset
from .select import select_masks, use_sets
from .tune import PenaltySearch, PenaltyTrial, tune_penalty

__all__ = [
    "PRESETS",
    "Annealing",
    "LearnResult",
    "MaskSet",
    "PenaltySearch",
    "PenaltyTrial",
    "expected_count_masks",
    "expected_l0",
    "export_masks",
    "from_prune",
    "import_masks",
    "learn_masks",
    "magnitude_masks",
    "mask_model",
    "masked_layers",
    "preset",
    "random_masks",
    "select_masks",
    "set_mode",
    "to_prune",
    "tune_penalty",
    "unmask_model",
    "use_set",
    "use_sets",
    "weight_hash",
]
