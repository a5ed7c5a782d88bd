"""The training loop: what it learns, and how it goes on after an interruption."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from accelsearch.shapes import fit as fit_module
from accelsearch.shapes.fit import fit

STEPS = 60


class Clock:
    """Time that passes only where a test says so."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(fit_module, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


class Toy:
    """A small network that learns a sine, each step of which takes `seconds`."""

    def __init__(self, clock: Clock, seconds: float = 1.0, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.module = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
        self.values: list[float] = []
        self.seen: list[dict[str, Tensor]] = []
        self._clock, self._seconds = clock, seconds

    def error(self) -> Tensor:
        x = torch.linspace(-3, 3, 64)[:, None]
        error: Tensor = (self.module(x) - x.sin()).square().mean()
        return error

    def loss(self) -> Tensor:
        self._clock.now += self._seconds
        self.seen.append({name: one.detach().clone() for name, one in self.parameters().items()})
        value = self.error()
        self.values.append(value.item())
        return value

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.module.named_parameters())

    def fit(
        self,
        checkpoint: Path,
        *,
        steps: int = STEPS,
        loss: Callable[[], Tensor] | None = None,
        until: float = float("inf"),
        learning_rate: float = 1e-2,
    ) -> bool:
        return fit(
            self.module,
            loss or self.loss,
            steps=steps,
            learning_rate=learning_rate,
            ema=0.9,
            seed=1,
            checkpoint=checkpoint,
            until=until,
        )


def progress(checkpoint: Path) -> dict[str, float]:
    with safe_open(checkpoint, framework="pt") as file:
        found: dict[str, float] = json.loads(file.metadata()["progress"])
    return found


def tensors(checkpoint: Path, column: str) -> dict[str, Tensor]:
    with safe_open(checkpoint, framework="pt") as file:
        return {
            name.removeprefix(f"{column}."): file.get_tensor(name)
            for name in file.keys()  # noqa: SIM118
            if name.startswith(f"{column}.")
        }


def test_the_loss_falls(clock: Clock, tmp_path: Path) -> None:
    toy = Toy(clock)
    before = toy.error().item()
    assert toy.fit(tmp_path / "toy.safetensors", steps=600)
    assert len(toy.values) == 600
    assert toy.error().item() < 0.1 * before


def test_the_module_ends_with_the_averaged_weights(clock: Clock, tmp_path: Path) -> None:
    toy, checkpoint = Toy(clock), tmp_path / "toy.safetensors"
    toy.fit(checkpoint)
    last = tensors(checkpoint, "parameter")
    path = [*toy.seen[1:], last]  # after each step
    for name, parameter in toy.parameters().items():
        average = toy.seen[0][name]
        for step, weights in enumerate(path):
            decay = min(0.9, (1 + step) / (10 + step))
            average = decay * average + (1 - decay) * weights[name]
        assert torch.allclose(parameter, average, atol=1e-6)
        assert not torch.allclose(parameter, last[name], atol=1e-6)


def test_an_interrupted_run_continues_to_what_it_would_have_been(
    clock: Clock, tmp_path: Path
) -> None:
    whole = Toy(clock)
    assert whole.fit(tmp_path / "whole.safetensors")

    checkpoint = tmp_path / "parts.safetensors"
    first = Toy(clock)
    assert not first.fit(checkpoint, until=clock.now + 20)
    assert len(first.values) == 20
    assert progress(checkpoint) == {"steps": 20, "seconds": 20.0}
    second = Toy(clock, seed=5)  # its own weights must not matter
    assert not second.fit(checkpoint, until=clock.now + 15)
    third = Toy(clock, seed=6)
    assert third.fit(checkpoint)

    assert first.values + second.values + third.values == pytest.approx(whole.values, rel=1e-5)
    assert progress(checkpoint) == {"steps": STEPS, "seconds": float(STEPS)}
    for name, parameter in third.parameters().items():
        assert torch.allclose(parameter, whole.parameters()[name], atol=1e-6)


def test_an_interrupted_run_leaves_averaged_weights_too(clock: Clock, tmp_path: Path) -> None:
    toy, checkpoint = Toy(clock), tmp_path / "toy.safetensors"
    toy.fit(checkpoint, until=clock.now + 20)
    average = tensors(checkpoint, "average")
    assert set(average) == set(toy.parameters())
    assert all(torch.equal(one, average[name]) for name, one in toy.parameters().items())


def test_a_finished_run_is_not_trained_again(clock: Clock, tmp_path: Path) -> None:
    toy, checkpoint = Toy(clock), tmp_path / "toy.safetensors"
    toy.fit(checkpoint)
    again = Toy(clock, seed=5)
    assert again.fit(checkpoint)
    assert again.values == []
    assert all(torch.equal(one, toy.parameters()[n]) for n, one in again.parameters().items())


def test_a_killed_run_continues_from_the_last_checkpoint_that_it_saved(
    clock: Clock, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "toy.safetensors"
    toy = Toy(clock, seconds=10.0)  # a checkpoint a minute

    def killed() -> Tensor:
        if len(toy.values) == 20:
            raise KeyboardInterrupt
        return toy.loss()

    with pytest.raises(KeyboardInterrupt):
        toy.fit(checkpoint, loss=killed)
    saved = progress(checkpoint)["steps"]
    assert 10 <= saved < 20
    again = Toy(clock, seconds=10.0)
    assert again.fit(checkpoint)
    assert len(again.values) == STEPS - saved
    assert again.values[: 20 - int(saved)] == pytest.approx(toy.values[int(saved) :], rel=1e-5)


def test_a_checkpoint_is_safetensors_and_nothing_else_is_left(clock: Clock, tmp_path: Path) -> None:
    checkpoint = tmp_path / "folder" / "toy.safetensors"
    toy = Toy(clock)
    toy.fit(checkpoint)
    assert [path.name for path in checkpoint.parent.iterdir()] == ["toy.safetensors"]
    header = int.from_bytes(checkpoint.read_bytes()[:8], "little")
    described = json.loads(checkpoint.read_bytes()[8 : 8 + header])
    assert {name.split(".")[0] for name in described if name != "__metadata__"} == {
        "parameter",
        "average",
        "step",
        "exp_avg",
        "exp_avg_sq",
    }


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_refused(clock: Clock, tmp_path: Path, bad: float) -> None:
    toy = Toy(clock)
    with pytest.raises(FloatingPointError, match="must stay finite"):
        toy.fit(tmp_path / "toy.safetensors", loss=lambda: toy.loss() * bad)


@pytest.mark.parametrize("until", [float("inf"), 300.0])
def test_a_loss_that_turns_nan_never_reaches_the_checkpoint(
    clock: Clock, tmp_path: Path, until: float
) -> None:
    checkpoint = tmp_path / "toy.safetensors"
    toy = Toy(clock, seconds=10.0)  # a checkpoint a minute
    with pytest.raises(FloatingPointError, match="finite"):
        toy.fit(
            checkpoint,
            loss=lambda: toy.loss() * (float("nan") if len(toy.values) >= 26 else 1.0),
            until=until,
        )
    assert 0 < progress(checkpoint)["steps"] < 26
    for column in ("parameter", "average", "exp_avg", "exp_avg_sq"):
        assert all(one.isfinite().all() for one in tensors(checkpoint, column).values())


def test_the_seed_fixes_the_random_numbers_of_the_loss(clock: Clock, tmp_path: Path) -> None:
    drawn: list[list[float]] = []
    for attempt in range(2):
        toy = Toy(clock)
        numbers: list[float] = []

        def loss(toy: Toy = toy, numbers: list[float] = numbers) -> Tensor:
            numbers.append(torch.rand(()).item())
            return toy.loss()

        torch.manual_seed(100 + attempt)
        toy.fit(tmp_path / f"{attempt}.safetensors", steps=5, loss=loss)
        drawn.append(numbers)
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == 5


def test_the_learning_rate_rises_at_first_and_ends_low(clock: Clock, tmp_path: Path) -> None:
    toy = Toy(clock)
    steps = 1000
    toy.fit(tmp_path / "toy.safetensors", steps=steps, loss=lambda: toy.loss() * 0, learning_rate=1)
    # With a loss of zero the decay of the weights, 0.01 x the rate, is all that moves them.
    weights = torch.stack([one["0.weight"].abs().mean() for one in toy.seen])
    rates = 100 * (1 - weights[1:] / weights[:-1])
    assert rates[0] < 0.02
    assert rates.argmax() == pytest.approx(200, abs=10)
    assert rates.max() == pytest.approx(0.9, abs=0.05)
    assert rates[-1] == pytest.approx(0.02, abs=0.01)
