"""One training by TRL, from a decoder and back to it: resumed where it was cut, logged to TensorBoard."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roro_fast.config_trl import TrlConfig
from roro_fast.models.decoder import Decoder
from roro_fast.models.lm_trainer import Tick
from roro_fast.train.trl.actor import load_actor, sync

START = "start"  # the weights a phase began with: also the reference of its KL term


@dataclass(frozen=True, slots=True)
class Job:
    """Where one training leaves its checkpoints (`out`) and its TensorBoard events (`logs`), and how it is set up.

    `seed` is the phase's: both end in it.
    """

    out: Path
    logs: Path
    config: TrlConfig
    seed: int
    tick: Tick

    def actor(self, decoder: Decoder) -> Any:
        """The twin of the decoder as it is now. Training states of other phases are not needed any more."""
        for other in self.out.parent.glob("*"):
            if other.name.rpartition("-")[2] != str(self.seed):
                shutil.rmtree(other, ignore_errors=True)
        return load_actor(decoder, self.out / START, self.config)


def fit(trainer: Any, decoder: Decoder, job: Job) -> list[dict[str, float]]:
    """Train to the end, from the last whole checkpoint if there is one; returns the log's rows, one per update."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback
    from transformers.trainer_callback import PrinterCallback, TrainerCallback
    from transformers.trainer_utils import get_last_checkpoint

    class Tick(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            job.tick()

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Tick())
    last = get_last_checkpoint(str(job.out))
    with SummaryWriter(str(job.logs)) as writer, quiet():
        trainer.add_callback(TensorBoardCallback(writer))
        trainer.train(resume_from_checkpoint=last)
    sync(trainer.model, decoder)
    return [row for row in trainer.state.log_history if "loss" in row]


@contextmanager
def quiet() -> Iterator[None]:
    """Without progress bars, TRL's notice that a feature is young, and what transformers says of its own renamings."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*rollout_func.*", category=UserWarning)
            warnings.filterwarnings("ignore", category=FutureWarning)
            yield
    finally:
        if bars:
            logging.enable_progress_bar()


class Silent:
    """A trainer that neither reports its use to a server nor writes model cards; comes first among the bases."""

    def _send_telemetry(self) -> None: ...

    def create_model_card(self, *_: Any, **__: Any) -> None: ...


def mean(rows: list[dict[str, float]], key: str) -> float:
    """Mean of a logged value over the rows that have it, NaN without one."""
    found = [r[key] for r in rows if r.get(key) is not None]
    return sum(found) / len(found) if found else float("nan")
