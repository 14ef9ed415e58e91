"""The training loop: FSDP2 at any world size, exact resume, validation with retrieval on and off.

Data state is one number, samples consumed; a step takes the next global_batch_size samples,
whatever the world size. The loss of a step is a sum over the valid labels of all ranks divided by
their number.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from etl.storage import join_url, put_file, scratch_folder
from model.checkpoint import Checkpointer
from model.copy_warmup import only_copies, random_copies
from model.evaluation import LossSums, batches_of, loss_sums, token_losses
from model.initialization import generator_seed
from model.interruption import Interruption
from model.metrics import MetricsConfig, MetricsLog
from model.optimizer import OptimConfig, learning_rate, set_learning_rate
from model.parallel import all_reduce_sum, sum_over_replicas
from model.prefetch import Prefetcher
from model.retro import Retro
from model.samples import Batch
from model.throughput import Throughput
from model.training_data import TrainingData

log = logging.getLogger(__name__)
_MEASURED_STEPS = 20
_MOST_SKIPPED = 20


class TrainerError(ValueError):
    """Options of the training loop that contradict each other, or training that has diverged."""


@dataclass(frozen=True)
class TrainerConfig:
    """The loop.

    Attributes:
        max_steps: Optimizer steps.
        max_minutes: Fewer steps if max_steps would take longer: the number that fits is measured
            over the first 20 steps and then fixed, so that the schedule is known and a resumed run
            keeps it.
        stop_after_steps: Save and end after so many steps of this start; the schedule stays, and
            the next start continues.
        stop_after_seconds: The same after so many seconds.
        global_batch_size: Samples a step, over all ranks.
        micro_batch_size: Samples of one forward and backward pass on one rank.
        copy_warmup_steps: First steps, in which only labels count that a neighbor in sight holds:
            what can be copied is learned before what cannot.
        copy_warmup_tokens: Of these steps: text, the run's own samples; or random tokens, one of
            whose neighbors is the sample's own text (needs retrieval_start=copying to be learned
            quickly).
        retrieval_off_share: Share of the steps after the first and after a copy warm-up, drawn by
            the seed, that train without retrieval. A model that never did gains from neighbors by
            their being there, whatever they say.
        seed: Of initial weights and sample order.
        val_interval: Steps between validations; there is always one at the end.
        val_samples: Samples of a validation.
        profile_steps: First and last step, from 1, of a trace by torch.profiler, which every rank
            writes to `profile/` in the run's folder.
    """

    max_steps: int = 1000
    max_minutes: float | None = None
    stop_after_steps: int | None = None
    stop_after_seconds: float | None = None
    global_batch_size: int = 32
    micro_batch_size: int = 8
    copy_warmup_steps: int = 0
    copy_warmup_tokens: Literal["text", "random"] = "text"
    retrieval_off_share: float = 0.0
    seed: int = 0
    val_interval: int = 200
    val_samples: int = 64
    profile_steps: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.retrieval_off_share < 1:
            raise TrainerError(
                f"retrieval_off_share is {self.retrieval_off_share}; expected 0 or more, below 1"
            )
        if self.copy_warmup_tokens == "random" and not self.copy_warmup_steps:
            raise TrainerError("copy_warmup_tokens=random has no effect without copy_warmup_steps")


_FREE = {
    "micro_batch_size",
    "stop_after_steps",
    "stop_after_seconds",
    "val_interval",
    "val_samples",
    "profile_steps",
}


def describe(config: TrainerConfig, optim: OptimConfig) -> dict[str, Any]:
    """What determines the course of a run, for its configuration record."""
    return {k: v for k, v in asdict(config).items() if k not in _FREE} | {"optim": asdict(optim)}


def rank_share(global_batch_size: int, step: int, rank: int, world_size: int) -> tuple[int, int]:
    """(first, count): a rank's places of a step in the sequence of samples. Those of all ranks, in
    their order, are the step's, whatever the world size."""
    count = global_batch_size // world_size
    return step * global_batch_size + rank * count, count


def seed_dropout(device: torch.device, seed: int, step: int, rank: int) -> None:
    """Of the device alone: `torch.manual_seed` notes a stack trace for every device that is not
    there, step after step."""
    on_gpu = device.type == "cuda"
    generator = torch.cuda.default_generators[device.index] if on_gpu else torch.default_generator
    generator.manual_seed(generator_seed(seed, f"step {step} rank {rank}"))


class Trainer:
    """Trains a sharded model.

    Raises:
        TrainerError: batch sizes that do not divide, or options of retrieval without it.
    """

    def __init__(
        self,
        config: TrainerConfig,
        optim: OptimConfig,
        model: Retro,
        optimizer: torch.optim.Optimizer,
        mesh: DeviceMesh,
        data: TrainingData,
        checkpointer: Checkpointer,
        throughput: Throughput,
    ) -> None:
        self.config, self.optim, self.model, self.optimizer = config, optim, model, optimizer
        self.data, self.checkpointer, self.throughput = data, checkpointer, throughput
        self.run_url = checkpointer.run_url
        self.rank, self.world_size = mesh.get_rank(), mesh.size()
        self.device = torch.device(mesh.device_type)
        if mesh.device_type == "cuda":
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._check()
        # Gradients through sharp attention become denormal numbers, which CPUs compute many times
        # more slowly.
        torch.set_flush_denormal(True)
        self.max_steps = config.max_steps
        self.step = self.samples = self.tokens = self.skipped = self._skipped_in_a_row = 0
        self.validation: dict[str, float] = {}
        self._rate_is_known = config.max_minutes is None

    def _check(self) -> None:
        config = self.config
        if config.global_batch_size % (self.world_size * config.micro_batch_size):
            raise TrainerError(
                f"global_batch_size {config.global_batch_size} is not a multiple of "
                "micro_batch_size "
                f"{config.micro_batch_size} times {self.world_size} ranks"
            )
        if config.copy_warmup_steps and not self.uses_retrieval:
            raise TrainerError(
                "copy_warmup_steps needs neighbors to copy from, but the model has no retrieval"
            )
        is_set = self.optim.retrieval_lr_ratio != 1 or config.retrieval_off_share
        if is_set and not self.uses_retrieval:
            raise TrainerError(
                "optim.retrieval_lr_ratio and trainer.retrieval_off_share have no effect on a model"
                " without retrieval; leave them out"
            )

    @property
    def uses_retrieval(self) -> bool:
        return self.data.train.neighbors > 0

    def run(self, metrics_config: MetricsConfig) -> dict[str, Any]:
        """Trains from the newest checkpoint, or from the start, to the end or until it is told to
        stop; returns counts, rate and last losses, those of the checkpoint if the run was complete
        before."""
        progress = self.checkpointer.restore()
        if progress is not None:
            self._restore(progress)
            log.info("continuing at step %d of %d", self.step, self.max_steps)
        metrics = None
        if self.rank == 0:
            about = self.checkpointer.about["run"]
            metrics = MetricsLog(metrics_config, self.run_url, self.step, about)
        stopped = None
        try:
            if self.step < self.max_steps:
                stopped = self._train(metrics, metrics_config.interval)
        finally:
            torch.set_flush_denormal(False)
        self.checkpointer.wait()
        if metrics is not None:
            metrics.close()
        return {
            "steps": self.step,
            "samples": self.samples,
            "tokens": self.tokens,
            "tokens_per_s": self.tokens / self.throughput.seconds if self.step else None,
            "skipped_steps": self.skipped,
            "world_size": self.world_size,
            "stopped": stopped,
            **self.validation,
        }

    def _train(self, metrics: MetricsLog | None, interval: int) -> str | None:
        """Steps to the end; the reason if something stopped them earlier."""
        config, first = self.config, self.step
        bar = tqdm(
            total=self.max_steps,
            initial=first,
            desc="train",
            file=sys.stderr,
            mininterval=2,
            disable=self.rank != 0,
        )
        batches = Prefetcher(self.batches, self.device, first, self.max_steps)
        interruption = Interruption(config.stop_after_steps, config.stop_after_seconds)
        try:
            with bar, interruption:
                while self.step < self.max_steps:
                    reason = interruption.reason(self.step - first + 1)
                    with self._profiled(), self.throughput.step():
                        values, is_stopped = self.train_step(batches, bool(reason))
                    self._after_step(metrics, interval, values, is_stopped, bar)
                    if is_stopped and self.step < self.max_steps:
                        log.info("stopped at step %d: %s", self.step, reason or "another rank")
                        return reason or "another rank"
        finally:
            batches.close()
        return None

    def _after_step(
        self,
        metrics: MetricsLog | None,
        interval: int,
        values: dict[str, Any],
        is_stopped: bool,
        bar: tqdm,
    ) -> None:
        """Whatever is due. The last validation comes before the last checkpoint, which holds it."""
        self.checkpointer.poll()
        if not self._rate_is_known and self.step >= _MEASURED_STEPS:
            self._fix_max_steps()
            bar.total = self.max_steps
        bar.update()
        is_last = self.step >= self.max_steps
        if metrics is not None and (self.step % interval == 0 or is_last):
            rates = self.throughput.report()
            metrics.write(self.step, values | rates)
            mfu = "n/a" if rates["mfu"] is None else f"{100 * rates['mfu']:.1f}%"
            rate = f"{rates['tokens_per_s']:.0f}"
            shown = {"loss": f"{values['loss']:.3f}", "tokens/s": rate, "MFU": mfu}
            bar.set_postfix(shown, refresh=False)
        if is_last or self.step % self.config.val_interval == 0:
            self.validation = self._validate(metrics)
        if is_last or is_stopped or self.step % self.checkpointer.config.interval == 0:
            if metrics is not None:
                metrics.sync()
            self.checkpointer.save(self.step, self._progress())

    def _fix_max_steps(self) -> None:
        """The steps that fit into max_minutes at the speed so far, the same number on all ranks."""
        assert self.config.max_minutes is not None
        fitting = int(self.config.max_minutes * 60 * self.step / self.throughput.seconds)
        value = torch.tensor([max(self.step, fitting)], device=self.device)
        dist.broadcast(value, 0)
        self.max_steps = min(self.config.max_steps, int(value))
        self._rate_is_known = True
        log.info("%d steps fit into %.1f minutes", self.max_steps, self.config.max_minutes)

    def train_step(self, prefetched: Prefetcher, stop: bool) -> tuple[dict[str, Any], bool]:
        """Forward, backward and update on the next global_batch_size samples; values to log, and
        whether any rank wants to stop. Dropout depends on the seed, the step and the rank alone.
        """
        self.model.train()
        seed_dropout(self.device, self.config.seed, self.step, self.rank)
        lr = learning_rate(self.optim, self.step, self.max_steps)
        set_learning_rate(self.optimizer, lr, self.step < self.config.copy_warmup_steps)
        with self.throughput.waiting():
            work = prefetched.take()
        with_retrieval = self._with_retrieval(self.step)
        counts = all_reduce_sum(torch.tensor([work.valid, stop], device=self.device))
        total = torch.zeros((), device=self.device)
        for i, batch in enumerate(work.batches):
            sum_over_replicas(self.model, is_last=i == len(work.batches) - 1)
            losses = token_losses(self.model, batch, with_retrieval, batch.loss_mask)
            loss = losses.sum() / counts[0].clamp_min(1)
            # FSDP takes the mean of the ranks' gradients.
            (loss * self.world_size).backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self._trainable(), self.optim.clip_grad)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        # Here the host waits for the device.
        found = torch.stack([all_reduce_sum(total), norm, counts[1].float()]).tolist()
        self._update(found[0], found[1])
        self._count(with_retrieval)
        by_group = {
            f"lr/decay{g['weight_decay']:g}_x{g['lr_mult'] * g['lr_ratio']:g}": g["lr"]
            for g in self.optimizer.param_groups
        }
        values = {"loss": found[0], "lr": lr, **by_group, "grad_norm": found[1]}
        return values | {"skipped_steps": self.skipped, "tokens": self.tokens}, found[2] > 0

    def _update(self, loss: float, norm: float) -> None:
        """The optimizer's step; none if loss or gradients are not finite.

        Raises:
            TrainerError: many steps in a row were not finite.
        """
        if isfinite(loss) and isfinite(norm):
            self.optimizer.step()
            self._skipped_in_a_row = 0
        else:
            self.skipped += 1
            self._skipped_in_a_row += 1
            log.warning("step %d skipped: loss %s, gradient norm %s", self.step, loss, norm)
        self.optimizer.zero_grad()
        if self._skipped_in_a_row >= _MOST_SKIPPED:
            raise TrainerError(
                f"{_MOST_SKIPPED} steps in a row, to step {self.step}, had a loss or gradients that"
                f" are not finite (loss {loss}, norm {norm}); the run has diverged: start another "
                "with a smaller optim.lr, or from an earlier checkpoint"
            )

    def _count(self, with_retrieval: bool) -> None:
        samples = self.config.global_batch_size
        tokens = samples * self.data.train.seq_length
        neighbors = self.data.train.neighbors if with_retrieval else 0
        self.throughput.count(samples, tokens, tokens * 2 * neighbors)
        self.step += 1
        self.samples += samples
        self.tokens += tokens

    def _trainable(self) -> list[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step."""
        config = self.config
        share = rank_share(config.global_batch_size, step, self.rank, self.world_size)
        if step >= config.copy_warmup_steps:
            batch = self.data.train.read(*share)
        elif config.copy_warmup_tokens == "text":
            batch = only_copies(self.data.train.read(*share))
        else:
            batch = self._random_copies(*share)
        return batch.split(config.micro_batch_size)

    def _with_retrieval(self, step: int) -> bool:
        config = self.config
        drawn = generator_seed(config.seed, f"retrieval off {step}") / 2.0**63
        is_on = step <= config.copy_warmup_steps or drawn >= config.retrieval_off_share
        return self.uses_retrieval and is_on

    def _random_copies(self, first: int, count: int) -> Batch:
        train, about = self.data.train, self.data.about
        vocabulary = np.setdiff1d(np.arange(about.vocab_size), [about.pad_id, about.eod_id])
        shape = (train.seq_length, about.chunk_size, train.neighbors)
        places = np.arange(first, first + count)
        return random_copies(places, self.config.seed, vocabulary, *shape)

    @contextmanager
    def _profiled(self) -> Iterator[None]:
        """Traces the steps of profile_steps."""
        first, last = self.config.profile_steps or (-1, -1)
        if self.step + 1 == first:
            activities = [ProfilerActivity.CPU]
            if self.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profiler = profile(activities=activities)
            self._profiler.start()
        yield
        if self.step == last and hasattr(self, "_profiler"):
            self._profiler.stop()
            with scratch_folder(join_url(self.run_url, "profile")) as scratch:
                name = f"rank-{self.rank}.json.gz"
                self._profiler.export_chrome_trace(str(scratch / name))
                put_file(scratch / name, join_url(self.run_url, "profile", name))
            del self._profiler

    def _validate(self, metrics: MetricsLog | None) -> dict[str, float]:
        """Validation losses over all ranks, with retrieval on (if the model has it) and off."""
        reader = self.data.validation
        if reader is None:
            return {}
        self.model.eval()
        count = min(self.config.val_samples, reader.num_samples)
        batches = batches_of(
            np.arange(count), self.config.micro_batch_size, self.rank, self.world_size
        )
        values = {}
        for name, retrieval in (("val_loss_on", True), ("val_loss_off", False)):
            if self.uses_retrieval or not retrieval:
                sums = loss_sums(self.model, reader, batches, retrieval, self.device)
                reduced = all_reduce_sum(torch.from_numpy(sums).to(self.device))
                values[name] = LossSums(*reduced.tolist()).summary()["loss"]
        if metrics is not None:
            metrics.write(self.step, values)
        return values

    def _progress(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "samples": self.samples,
            "tokens": self.tokens,
            "skipped_steps": self.skipped,
            "max_steps": self.max_steps,
            "fixed": self._rate_is_known,
            "seconds": self.throughput.seconds,
            "validation": self.validation,
        }

    def _restore(self, progress: dict[str, Any]) -> None:
        self.step, self.samples = progress["step"], progress["samples"]
        self.tokens, self.skipped = progress["tokens"], progress["skipped_steps"]
        self.throughput.seconds = progress["seconds"]
        self.validation = progress["validation"]
        if progress["fixed"] and self.config.max_minutes is not None:
            self.max_steps, self._rate_is_known = progress["max_steps"], True
