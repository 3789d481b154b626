"""Polarize pretrained Transformers: a 4-bit or 8-bit backbone with thin high-precision surrogate paths."""

from importlib.metadata import version

from .checkpoint import save_polarized
from .configuration import PolarizeConfig, SurrogateConfig
from .hub import push_polarized
from .polarization import polarize
from .surrogate import backbone_only, merge_surrogates

__version__ = version("hf-polarize")
__all__ = [
    "PolarizeConfig",
    "SurrogateConfig",
    "backbone_only",
    "merge_surrogates",
    "polarize",
    "push_polarized",
    "save_polarized",
]
