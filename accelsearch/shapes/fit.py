"""A training loop whose step is one CUDA graph, with checkpoints that it continues from."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

log = logging.getLogger(__name__)

_WARMUP = 200  # steps over which the learning rate rises
_FLOOR = 0.02  # share of the learning rate that the cosine ends at
_CLIP = 1.0  # gradient norm
_SAVE_EVERY = 60.0  # seconds
_REPORT_EVERY = 250  # steps


def fit(
    module: nn.Module,
    loss: Callable[[], Tensor],
    *,
    steps: int,
    learning_rate: float,
    ema: float,
    seed: int,
    checkpoint: Path,
    until: float = math.inf,
) -> bool:
    """Train `module` until `steps` are done, then leave its averaged weights in it.

    `loss` draws its own batch and returns a scalar; on CUDA it is captured, so it must not
    synchronise or branch on values. `ema` is the decay of the averaged weights. Training stops
    early at the `time.monotonic()` moment `until`; a later call with the same `checkpoint`
    continues it (with fresh random numbers: equal in distribution, not bit for bit).
    Returns whether all steps are done. Either way the module holds averaged weights.

    Raises:
        FloatingPointError: the loss or a weight is no longer finite; the checkpoint stays as it
            was when they last were.
    """
    state = _State(module, learning_rate)
    done, spent = state.load(checkpoint) if checkpoint.exists() else (0, 0.0)
    torch.manual_seed(seed + done)
    step = state.capture(loss) if next(module.parameters()).is_cuda else state.eager(loss)

    started, saved, recent = time.monotonic(), time.monotonic(), torch.zeros(())
    while done < steps and time.monotonic() < until:
        progress = done / steps
        rate = min(1.0, (done + 1) / _WARMUP)
        rate *= _FLOOR + (1 - _FLOOR) * 0.5 * (1 + math.cos(math.pi * progress))
        state.learning_rate.fill_(learning_rate * rate)
        value = step()
        state.average(min(ema, (1 + done) / (10 + done)))
        done += 1
        if done % _REPORT_EVERY == 0 or done == steps:
            recent = value.detach().float().cpu()
            if not recent.isfinite():
                raise FloatingPointError(f"the loss must stay finite, got {recent} at step {done}")
            elapsed = spent + time.monotonic() - started
            log.info("step %d of %d: loss %.4f, %.0f s", done, steps, recent, elapsed)
        if time.monotonic() - saved > _SAVE_EVERY:
            state.save(checkpoint, done, spent + time.monotonic() - started)
            saved = time.monotonic()
    state.save(checkpoint, done, spent + time.monotonic() - started)
    state.use_average()
    return done >= steps


class _State:
    """Parameters, their average, and the optimiser, as flat lists of tensors."""

    def __init__(self, module: nn.Module, learning_rate: float) -> None:
        self.names = [name for name, _ in module.named_parameters()]
        self.parameters: list[Tensor] = list(module.parameters())
        self.averaged = [parameter.detach().clone() for parameter in self.parameters]
        cuda = self.parameters[0].is_cuda
        # A tensor: a captured step reads the rate from memory that we refill before each replay.
        self.learning_rate = torch.tensor(0.0, device=self.parameters[0].device)
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=self.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=0.01,
            fused=cuda,
            capturable=cuda,
            foreach=False if not cuda else None,
        )
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()  # with zero rate and gradients: only makes the optimiser's state

    def _step(self, loss: Callable[[], Tensor]) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters, _CLIP)
        self.optimizer.step()
        return value

    def eager(self, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return lambda: self._step(loss)

    def capture(self, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """The whole step as one graph: a small model's step is launch-bound otherwise."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        self.learning_rate.zero_()
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._step(loss)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph):
            value = self._step(loss)

        def replay() -> Tensor:
            graph.replay()
            return value

        return replay

    @torch.no_grad()
    def average(self, decay: float) -> None:
        torch._foreach_lerp_(self.averaged, self.parameters, 1 - decay)

    @torch.no_grad()
    def use_average(self) -> None:
        torch._foreach_copy_(self.parameters, self.averaged)

    def _tensors(self) -> dict[str, Tensor]:
        columns: dict[str, list[Tensor]] = {
            "parameter": [parameter.detach() for parameter in self.parameters],
            "average": self.averaged,
        }
        for key in ("step", "exp_avg", "exp_avg_sq"):
            columns[key] = [self.optimizer.state[parameter][key] for parameter in self.parameters]
        return {
            f"{column}.{name}": tensor
            for column, tensors in columns.items()
            for name, tensor in zip(self.names, tensors, strict=True)
        }

    def save(self, path: Path, done: int, spent: float) -> None:
        """Write everything needed to continue, atomically; no pickle is involved."""
        if not all(bool(tensor.isfinite().all()) for tensor in self._tensors().values()):
            raise FloatingPointError(
                f"the weights must stay finite, got NaN or infinity at step {done}; not saved"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        progress = json.dumps({"steps": done, "seconds": spent})
        partial = path.with_suffix(".partial")
        tensors = {name: tensor.contiguous() for name, tensor in self._tensors().items()}
        save_file(tensors, partial, metadata={"progress": progress})
        partial.replace(path)

    @torch.no_grad()
    def load(self, path: Path) -> tuple[int, float]:
        with safe_open(path, framework="pt") as file:
            progress = json.loads(file.metadata()["progress"])
            for name, tensor in self._tensors().items():
                tensor.copy_(file.get_tensor(name))
        return progress["steps"], progress["seconds"]
