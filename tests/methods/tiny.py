"""What the methods' tests share: making an image, what it costs, and what is left of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from accelsearch.methods import METHODS, Run

STEPS = 5
SIZE = 32
GUIDANCE = 4.0
SEED = 5

MakePipeline = Callable[..., Any]


def images(
    call: Any,
    prompts: Sequence[str] = ("a red circle",),
    seed: int = SEED,
    height: int = SIZE,
    steps: int = STEPS,
    **arguments: Any,
) -> torch.Tensor:
    """One image a prompt; `call` is a pipeline, or what a library has put in its place."""
    generators = [torch.Generator().manual_seed(seed + index) for index in range(len(prompts))]
    settings: dict[str, Any] = {
        "height": height,
        "width": SIZE,
        "num_inference_steps": steps,
        "guidance_scale": GUIDANCE,
        "generator": generators,
        "output_type": "pt",
    }
    result: torch.Tensor = call(list(prompts), **(settings | arguments)).images
    assert result.isfinite().all()
    return result


def run_of(pipeline: Any, steps: int = STEPS, **facts: Any) -> Run:
    defaults: dict[str, Any] = {
        "steps": steps,
        "guidance_scale": GUIDANCE,
        "batch_size": 1,
        "height": SIZE,
        "width": SIZE,
        "scheduler": type(pipeline.scheduler).__name__,
        "seed": SEED,
    }
    return Run(**(defaults | facts))


def apply(name: str, pipeline: Any, **params: Any) -> AbstractContextManager[None]:
    """The method at the default on this pipeline, which is not the identity, but for `params`."""
    run = run_of(pipeline)
    defaults = {one.name: one.default for one in METHODS[name].space(pipeline, run)}
    return METHODS[name].apply(pipeline, defaults | params, run)


def denoiser_of(pipeline: Any) -> Any:
    return pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer


@contextmanager
def work_of(pipeline: Any) -> Iterator[list[int]]:
    """How many values the denoiser's innermost modules put out, one entry a module call."""
    work: list[int] = []
    hooks = [
        module.register_forward_hook(lambda _, __, output: work.append(output.numel()))
        for module in denoiser_of(pipeline).modules()
        if not list(module.children())
    ]
    try:
        yield work
    finally:
        for hook in hooks:
            hook.remove()


def state_of(pipeline: Any) -> list[dict[str, int]]:
    """Class, attributes, hooks and weights of every module, of the pipeline and its scheduler.

    By their identities, and the weights by their addresses.
    """
    modules = [
        module
        for component in pipeline.components.values()
        if isinstance(component, torch.nn.Module)
        for module in component.modules()
    ]
    return [
        {name: id(value) for name, value in vars(holder).items()}
        | {f"hook {key}": id(hook) for key, hook in _hooks(holder).items()}
        | {"class": id(type(holder))}
        | {f"weight {key}": one.data_ptr() for key, one in _weights(holder).items()}
        for holder in (*modules, pipeline)
    ] + [{name: id(value) for name, value in vars(pipeline.scheduler).items() if callable(value)}]


def _weights(holder: Any) -> dict[str, torch.Tensor]:
    return {
        name: one for name, one in getattr(holder, "_parameters", {}).items() if one is not None
    }


def _hooks(holder: Any) -> dict[int, Any]:
    return {**getattr(holder, "_forward_hooks", {}), **getattr(holder, "_forward_pre_hooks", {})}


class BodyError(Exception):
    pass


def fail_at_step(step: int) -> Callable[..., dict[str, Any]]:
    def callback(_: Any, index: int, __: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        if index == step:
            raise BodyError
        return arguments

    return callback


@contextmanager
def deepcache_helper(pipeline: Any, params: dict[str, Any]) -> Iterator[Any]:
    """The library used by hand; it leaves forwards behind on the pipeline."""
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipe=pipeline)
    helper.set_params(**params)
    helper.enable()
    yield pipeline
    helper.disable()
