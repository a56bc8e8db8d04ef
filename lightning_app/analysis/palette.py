"""Colours of lines."""
from __future__ import annotations

__all__ = ['COLOURS']

# Okabe and Ito's, which the colour-blind tell apart, without the yellow, which is faint on white, and black
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#56B4E9', '#E69F00')
