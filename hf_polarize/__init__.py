"""Polarize pretrained Transformers: a 4-bit or 8-bit backbone with thin high-precision surrogate paths."""

from importlib.metadata import version

from .checkpoint import save_polarized
from .cim.configuration import CIMConfig
from .cim.hook import attach_cim, detach_cim, off_chip, reset_reads
from .configuration import ClosedForm, PolarizeConfig, SurrogateConfig
from .data import calibration_batches
from .distillation import teacher_dataset
from .hub import push_polarized
from .polarization import calibrate_to_chip, polarize
from .surrogate import backbone_only, merge_surrogates
from .training import PolarizeTrainer, distill

__version__ = version("hf-polarize")
__all__ = [
    "CIMConfig",
    "ClosedForm",
    "PolarizeConfig",
    "PolarizeTrainer",
    "SurrogateConfig",
    "attach_cim",
    "backbone_only",
    "calibrate_to_chip",
    "calibration_batches",
    "detach_cim",
    "distill",
    "merge_surrogates",
    "off_chip",
    "polarize",
    "push_polarized",
    "reset_reads",
    "save_polarized",
    "teacher_dataset",
]
