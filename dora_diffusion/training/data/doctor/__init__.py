"""The doctor: what is wrong with pictures and captions, before any weights are loaded.

It reads captions, masks and pictures with the very functions that training uses, so the two cannot disagree. A folder
alone needs neither torch nor pydantic.
"""

from dora_diffusion.training.data.doctor.examination import examine, examine_config
from dora_diffusion.training.data.doctor.findings import DoctorReport, Finding
from dora_diffusion.training.data.doctor.report import format_report

__all__ = ["DoctorReport", "Finding", "examine", "examine_config", "format_report"]
