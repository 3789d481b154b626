"""Polarize pretrained Transformers: a 4-bit or 8-bit backbone with thin high-precision surrogate paths."""

from .checkpoint import save_polarized
from .configuration import PolarizeConfig, SurrogateConfig
from .pipeline import polarize
from .surrogate import backbone_only, merge_surrogates

__all__ = ["PolarizeConfig", "SurrogateConfig", "backbone_only", "merge_surrogates", "polarize", "save_polarized"]
