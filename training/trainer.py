"""What both trainers share: steps, checkpoints from which an interrupted run goes on, and tables of shares."""

import os
import time
from pathlib import Path

import pandas as pd
import torch

COLUMNS = ["what", "n", "share", "low", "high"]


def rate(done: float, highest: float, warm: float) -> float:
    """Return the learning rate when the share `done` of the steps is done: up over a share `warm`, then down to 0."""
    return highest * (done / warm if done < warm else (1 - done) / (1 - warm))


class Trainer:
    """Steps of AdamW on the weights that require a gradient; a checkpoint brings back where a run stood."""

    def __init__(self, model, checkpoint: Path, total: int, highest: float, warm: float, decay: float):
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        self.model, self.checkpoint, self.total, self.highest, self.warm = model, checkpoint, total, highest, warm
        self.learnt = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.learnt, highest, betas=(0.9, 0.98), weight_decay=decay, fused=True)
        self.step, self.tokens, self.log, used, self.losses = 0, 0, [], 0.0, []
        if checkpoint.exists():
            kept = torch.load(checkpoint, weights_only=True)
            model.load_state_dict(kept["model"])
            self.optimizer.load_state_dict(kept["optimizer"])
            self.step, self.tokens, self.log, used = kept["step"], kept["tokens"], kept["log"], kept["used"]
        self.began = time.monotonic() - used

    def update(self, loss: torch.Tensor, tokens: int) -> None:
        """Go one step, for the loss of so many tokens."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate(self.step / self.total, self.highest, self.warm)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.learnt, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())
        self.step, self.tokens = self.step + 1, self.tokens + tokens

    def due(self, every: int) -> bool:
        """Return whether something that is to be done every so many steps, and after the last, is to be done now."""
        return self.step % every == 0 or self.step == self.total

    def mean_loss(self) -> float:
        """Return the mean loss since the last call."""
        losses, self.losses = self.losses, []
        return sum(losses) / len(losses)

    def seconds(self) -> float:
        """Return the time that the training took, in all runs together."""
        return time.monotonic() - self.began

    def keep(self) -> None:
        """Write the checkpoint, whole or not at all."""
        kept = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}
        partial = self.checkpoint.with_suffix(".part")
        torch.save(kept | {"tokens": self.tokens, "log": self.log, "used": self.seconds()}, partial)
        os.replace(partial, self.checkpoint)


def shares(found: dict) -> pd.DataFrame:
    """Return a table of shares with their intervals, by what was asked."""
    rows = [[what, share.n, share.value, share.low, share.high] for what, share in found.items()]
    return pd.DataFrame(rows, columns=COLUMNS).round(4)


def markdown(table: pd.DataFrame) -> str:
    """Return such a table for a card."""
    lines = ["| asked | n | right | 95 % interval |", "|---|---|---|---|"]
    for row in table.itertuples():
        lines.append(f"| {row.what} | {row.n} | {row.share:.3f} | [{row.low:.3f}, {row.high:.3f}] |")
    return "\n".join(lines)


def filled(script: str, **values) -> str:
    """Return the card of a trainer: the Markdown file beside its script, with the values in their places."""
    return Path(script).with_suffix(".md").read_text(encoding="utf-8").format(**values)
