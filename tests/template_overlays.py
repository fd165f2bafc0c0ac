"""The template's overlays are those of `configs/`: `python -m tests.template_overlays` copies them after a change."""

from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
THERE = REPOSITORY / "lora_lightning" / "template" / "project" / "configs"
COPIED = ("debug.yaml", "precision/bf16-base.yaml", "strategy/ddp.yaml", "logger/wandb.yaml")


def of_a_project(name: str) -> str:
    """What the overlay is in a project: its example names the project's experiment, its tracking the project."""
    text = (REPOSITORY / "configs" / name).read_text(encoding="utf-8")
    text = text.replace("configs/demo.yaml", "configs/experiment.yaml")
    return text.replace("project: lora_lightning", "project: {{ package }}")


if __name__ == "__main__":
    for name in COPIED:
        file = THERE / f"{name}.jinja"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(of_a_project(name), encoding="utf-8")
