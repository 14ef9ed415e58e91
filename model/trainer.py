"""The training loop: FSDP2 at any world size, exact resume, validation with retrieval on and off.

Data state is one number, samples consumed; a step takes the next global_batch_size samples,
whatever the world size. The loss of a step is a sum over the valid labels of all ranks divided by
their number.
"""

import logging
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from model.checkpoint import latest_checkpoint, resume, save_checkpoint
from model.evaluation import LossSums, batches_of, loss_sums, token_losses
from model.initialization import generator_seed
from model.metrics import MetricsLog
from model.optimizer import OptimConfig, learning_rate, set_learning_rate
from model.parallel import all_reduce_sum
from model.retro import Retro
from model.sampler import sample_ids
from model.samples import Batch, SampleReader, only_copies

log = logging.getLogger(__name__)
_MEASURED_STEPS = 20


class TrainerError(ValueError):
    """Options of the training loop that contradict each other."""


@dataclass(frozen=True)
class TrainerConfig:
    """The loop.

    Attributes:
        max_steps: Optimizer steps.
        max_minutes: Fewer steps if max_steps would take longer: the number that fits is measured
            over the first 20 steps and then fixed, so that the schedule is known and a resumed run
            keeps it.
        global_batch_size: Samples a step, over all ranks.
        micro_batch_size: Samples of one forward and backward pass on one rank.
        copy_warmup_steps: First steps, in which only labels count that a neighbor in sight holds:
            what can be copied is learned before what cannot.
        seed: Of initial weights and sample order.
        log_interval: Steps between metrics.
        val_interval: Steps between validations; there is always one at the end.
        val_samples: Samples of a validation.
        save_interval: Steps between checkpoints; there is always one at the end.
        keep_checkpoints: Checkpoints that are kept.
    """

    max_steps: int = 1000
    max_minutes: float | None = None
    global_batch_size: int = 32
    micro_batch_size: int = 8
    copy_warmup_steps: int = 0
    seed: int = 0
    log_interval: int = 10
    val_interval: int = 200
    val_samples: int = 64
    save_interval: int = 200
    keep_checkpoints: int = 2


class Trainer:
    """Trains a sharded model.

    Raises:
        TrainerError: batch sizes that do not divide, or copy warm-up without neighbors.
    """

    def __init__(
        self,
        config: TrainerConfig,
        optim: OptimConfig,
        optimizer: torch.optim.Optimizer,
        model: Retro,
        mesh: DeviceMesh,
        train: SampleReader,
        validation: SampleReader | None,
        run_url: str,
    ) -> None:
        self.config, self.optim, self.model, self.run_url = config, optim, model, run_url
        self.train_reader, self.validation_reader = train, validation
        self.device = mesh.device_type
        self.rank, self.world_size = mesh.get_rank(), mesh.size()
        self.per_rank = config.global_batch_size // self.world_size
        self._check()
        # Gradients through sharp attention become denormal numbers, which CPUs compute many times
        # more slowly.
        torch.set_flush_denormal(True)
        self.optimizer = optimizer
        self.max_steps = config.max_steps
        self.step = 0
        self.tokens = 0
        self.seconds = 0.0
        self.validation: dict[str, float] = {}
        self._rate_is_known = config.max_minutes is None

    def _check(self) -> None:
        config = self.config
        if config.global_batch_size % self.world_size or self.per_rank % config.micro_batch_size:
            raise TrainerError(
                f"global_batch_size {config.global_batch_size} is not a multiple of "
                "micro_batch_size "
                f"{config.micro_batch_size} times {self.world_size} ranks"
            )
        if config.copy_warmup_steps and self.train_reader.retrieval is None:
            raise TrainerError(
                "copy_warmup_steps needs neighbors to copy from, but the model has no retrieval"
            )

    @property
    def uses_retrieval(self) -> bool:
        return self.train_reader.retrieval is not None

    def run(self) -> dict[str, Any]:
        """Trains from the newest checkpoint, or from the start, to the end; returns counts, rate
        and last losses, those of the checkpoint if the run was complete before."""
        record = latest_checkpoint(self.run_url)
        if record is not None:
            self._restore(resume(record, self.model, self.optimizer))
            log.info("continuing at step %d of %d", self.step, self.max_steps)
        metrics = MetricsLog(self.run_url, self.step) if self.rank == 0 else None
        with tqdm(
            total=self.max_steps,
            initial=self.step,
            desc="train",
            file=sys.stderr,
            mininterval=2,
            disable=self.rank != 0,
        ) as bar:
            while self.step < self.max_steps:
                self._advance(metrics)
                bar.total = self.max_steps
                bar.update()
        if metrics is not None:
            metrics.close()
        return {
            "steps": self.step,
            "tokens": self.tokens,
            "tokens_per_s": self.tokens / self.seconds if self.step else None,
            "world_size": self.world_size,
            **self.validation,
        }

    def _advance(self, metrics: MetricsLog | None) -> None:
        """One step and whatever is due after it. The last validation comes before the last
        checkpoint, which holds it."""
        config = self.config
        before = time.monotonic()
        values = self.train_step()
        elapsed = time.monotonic() - before
        self.seconds += elapsed
        if not self._rate_is_known and self.step >= _MEASURED_STEPS:
            self._fix_max_steps()
        last = self.step == self.max_steps
        if metrics is not None and (self.step % config.log_interval == 0 or last):
            metrics.write(self.step, values | {"tokens_per_s": values["tokens"] / elapsed})
        if self.step % config.val_interval == 0 or last:
            self.validation = self._validate(metrics)
        if self.step % config.save_interval == 0 or last:
            if metrics is not None:
                metrics.sync()
            self.save()

    def _fix_max_steps(self) -> None:
        """The steps that fit into max_minutes at the speed so far, the same number on all ranks."""
        assert self.config.max_minutes is not None
        fitting = int(self.config.max_minutes * 60 * self.step / self.seconds)
        value = torch.tensor([max(self.step, fitting)], device=self.device)
        dist.broadcast(value, 0)
        self.max_steps = min(self.config.max_steps, int(value))
        self._rate_is_known = True
        log.info("%d steps fit into %.1f minutes", self.max_steps, self.config.max_minutes)

    def train_step(self) -> dict[str, float]:
        """Forward, backward and update on the next global_batch_size samples. Dropout depends on
        the seed, the step and the rank alone."""
        config = self.config
        self.model.train()
        torch.manual_seed(generator_seed(config.seed, f"step {self.step} rank {self.rank}"))
        lr = learning_rate(self.optim, self.step, self.max_steps)
        set_learning_rate(self.optimizer, lr)
        batches = [batch.to(self.device) for batch in self._micro_batches()]
        valid = all_reduce_sum(torch.stack([batch.loss_mask.sum() for batch in batches]).sum())
        total = torch.zeros((), device=self.device)
        for batch in batches:
            loss = token_losses(
                self.model, batch, self.uses_retrieval, batch.loss_mask
            ).sum() / valid.clamp_min(1)
            (loss * self.world_size).backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self._trainable(), self.optim.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        tokens = self.config.global_batch_size * self.train_reader.seq_length
        self.tokens += tokens
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        return {
            "loss": float(all_reduce_sum(total)),
            "lr": lr,
            "grad_norm": float(norm),
            "tokens": float(tokens),
        }

    def _trainable(self) -> list[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def _micro_batches(self) -> list[Batch]:
        """This rank's share of the step's samples."""
        config = self.config
        first = self.step * config.global_batch_size + self.rank * self.per_rank
        ids = sample_ids(first, self.per_rank, self.train_reader.num_samples, config.seed)
        parts = ids.reshape(-1, config.micro_batch_size)
        batches = [self.train_reader.read(part) for part in parts]
        warmup = self.step < config.copy_warmup_steps
        return [only_copies(batch) for batch in batches] if warmup else batches

    def _validate(self, metrics: MetricsLog | None) -> dict[str, float]:
        """Validation losses over all ranks, with retrieval on (if the model has it) and off."""
        if self.validation_reader is None:
            return {}
        self.model.eval()
        count = min(self.config.val_samples, self.validation_reader.num_samples)
        batches = batches_of(
            np.arange(count), self.config.micro_batch_size, self.rank, self.world_size
        )
        values = {}
        for name, retrieval in (("val_loss_on", True), ("val_loss_off", False)):
            if self.uses_retrieval or not retrieval:
                sums = loss_sums(
                    self.model, self.validation_reader, batches, retrieval, self.device
                )
                reduced = all_reduce_sum(
                    torch.tensor(sums.values(), dtype=torch.float64, device=self.device)
                )
                values[name] = LossSums(*reduced.tolist()).summary()["loss"]
        if metrics is not None:
            metrics.write(self.step, values)
        return values

    def save(self) -> None:
        progress = {
            "step": self.step,
            "tokens": self.tokens,
            "max_steps": self.max_steps,
            "fixed": self._rate_is_known,
            "seconds": self.seconds,
            "validation": self.validation,
        }
        save_checkpoint(
            self.run_url,
            self.step,
            self.model,
            self.optimizer,
            progress,
            self.config.keep_checkpoints,
        )

    def _restore(self, progress: dict[str, Any]) -> None:
        self.step, self.tokens = progress["step"], progress["tokens"]
        self.seconds, self.validation = progress["seconds"], progress["validation"]
        if progress["fixed"] and self.config.max_minutes is not None:
            self.max_steps, self._rate_is_known = progress["max_steps"], True


def describe(config: TrainerConfig, optim: OptimConfig) -> dict[str, Any]:
    """What determines the course of a run, for its configuration record."""
    free = {
        "micro_batch_size",
        "log_interval",
        "val_interval",
        "val_samples",
        "save_interval",
        "keep_checkpoints",
    }
    return {k: v for k, v in asdict(config).items() if k not in free} | {"optim": asdict(optim)}
