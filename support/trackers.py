"""Where people look besides metrics.jsonl: Weights & Biases and TensorBoard, each imported only if it was asked for.

Whether they are installed is asked by config.check, before anything is written.
"""

import uuid
from pathlib import Path

from support.files import replace_text


def trackers(folder: Path, keys: dict, start: int) -> list:
    """Those that log.wandb and log.tensorboard ask for; a resumed run goes on under its own id after step `start`."""
    return ([WandB(folder, keys)] if keys["log.wandb"] else []) + (
        [TensorBoard(folder, start)] if keys["log.tensorboard"] else [])


class WandB:
    """Metrics by step, and the printed samples as a table. Offline with WANDB_MODE=offline."""

    def __init__(self, folder: Path, keys: dict):
        import wandb

        stored = folder / "wandb-id.txt"
        if not stored.is_file():
            replace_text(stored, uuid.uuid4().hex[:12])
        self.wandb, self.rows = wandb, []
        self.run = wandb.init(project=keys["log.wandb"], name=folder.name, id=stored.read_text(), resume="allow",
                              dir=folder, config=keys)

    def metrics(self, row: dict) -> None:
        self.run.log({key: value for key, value in row.items() if key != "step"}, step=row["step"])

    def sample(self, row: dict) -> None:
        self.rows.append(list(row.values()))
        self.run.log({"samples": self.wandb.Table(columns=list(row), data=self.rows)}, step=row["step"])

    def close(self) -> None:
        self.run.finish()


class TensorBoard:
    """Metrics by step, and samples as text, in runs/NAME/tensorboard/."""

    def __init__(self, folder: Path, start: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)

    def metrics(self, row: dict) -> None:
        for key, value in row.items():
            if key != "step":
                self.writer.add_scalar(key, value, row["step"])

    def sample(self, row: dict) -> None:
        text = "\n".join(f"    {key}: {value}" for key, value in row.items())  # indented: Markdown keeps it as it is
        self.writer.add_text("samples", text, row["step"])

    def close(self) -> None:
        self.writer.close()
