"""What watches a run: W0's guard and report, checkpoints and exact resume, the export at the end, the run's report."""

from lora_lightning.training.callbacks.baselines import Baselines
from lora_lightning.training.callbacks.export_on_fit_end import ExportAtEnd
from lora_lightning.training.callbacks.freeze_base import FreezeBase
from lora_lightning.training.callbacks.initial_validation import MeasureBefore
from lora_lightning.training.callbacks.nan_guard import StopOnNonFinite
from lora_lightning.training.callbacks.prediction_writer import PredictionWriter
from lora_lightning.training.callbacks.progress_bar import Progress
from lora_lightning.training.callbacks.rank_telemetry import RankTelemetry
from lora_lightning.training.callbacks.run_report import RunReport
from lora_lightning.training.callbacks.step_figures import StepFigures
from lora_lightning.training.callbacks.throughput import Throughput
from lora_lightning.training.checkpoints.model_checkpoint import Checkpoints
from lora_lightning.training.checkpoints.resume import Resume

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
]
