"""What watches a run: W0's guard and report, checkpoints and exact resume, the export at the end, the run's report."""

from lora_lightning.training.callbacks.baselines import Baselines
from lora_lightning.training.callbacks.before import MeasureBefore
from lora_lightning.training.callbacks.checkpoints import Checkpoints
from lora_lightning.training.callbacks.export import ExportAtEnd
from lora_lightning.training.callbacks.finite import StopOnNonFinite
from lora_lightning.training.callbacks.freeze import FreezeBase
from lora_lightning.training.callbacks.predictions import PredictionWriter
from lora_lightning.training.callbacks.progress import Progress
from lora_lightning.training.callbacks.rank_telemetry import RankTelemetry
from lora_lightning.training.callbacks.resume import Resume
from lora_lightning.training.callbacks.run_report import RunReport
from lora_lightning.training.callbacks.step_figures import StepFigures
from lora_lightning.training.callbacks.throughput import Throughput
from lora_lightning.training.callbacks.tracking import Tracking

__all__ = [
    "Baselines",
    "Checkpoints",
    "ExportAtEnd",
    "FreezeBase",
    "MeasureBefore",
    "PredictionWriter",
    "Progress",
    "RankTelemetry",
    "Resume",
    "RunReport",
    "StepFigures",
    "StopOnNonFinite",
    "Throughput",
    "Tracking",
]
