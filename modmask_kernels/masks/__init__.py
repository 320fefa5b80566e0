"""Mask sets: conversion of models, algebra and files of masks, learning."""

from .convert import mask_model, masked_layers, set_mode, unmask_model, use_set

__all__ = [
    "mask_model",
    "masked_layers",
    "set_mode",
    "unmask_model",
    "use_set",
]
