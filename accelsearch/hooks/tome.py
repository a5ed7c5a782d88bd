"""Token merging: let the UNet's self-attentions see fewer tokens, the most similar ones as one.

Source: Bolya and Hoffman, "Token Merging for Fast Stable Diffusion", CVPR Workshop on Efficient
Deep Learning for Computer Vision 2023, arXiv:2303.17604. The merging is that of the authors'
`tomesd`; what is added here is what serving needs: the same seed gives the same image, and the
pipeline is restored exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import tomesd
from diffusers.models.attention import BasicTransformerBlock

from accelsearch.hooks.shared import CallSteps, Phase, kept_of


@contextmanager
def apply_tome(
    pipeline: Any, *, ratio: float, max_downsample: int, sx: int = 2, sy: int = 2, seed: int = 0
) -> Iterator[Phase]:
    """Merge tokens by the library until the exit, which gives each block its own class back.

    Which token of each `sx` by `sy` is kept is drawn anew in each block and step; each pipeline
    call draws the same, from `seed`. (The library forks the global generator once and lets it run
    on from call to call.)
    """
    unet = pipeline.unet
    modules = (unet, *blocks_of(unet))
    # remove_patch() leaves this one behind on the modules, and an earlier one may be there.
    before = {module: vars(module).get("_tome_info") for module in modules}
    seeding = None
    try:
        tomesd.apply_patch(unet, ratio=ratio, max_downsample=max_downsample, sx=sx, sy=sy)
        seeding = unet.register_forward_pre_hook(_seed_each_call(pipeline, seed))
        yield lambda: (ratio, max_downsample, sx, sy)  # every step is like the others
    finally:
        if seeding is not None:
            seeding.remove()
        tomesd.remove_patch(unet)
        for module, info in before.items():
            if info is None:
                vars(module).pop("_tome_info", None)
            else:
                module._tome_info = info


def blocks_of(module: Any) -> list[Any]:
    """The transformer blocks in a module, in which tokens can be merged."""
    return [one for one in module.modules() if isinstance(one, BasicTransformerBlock)]


def _seed_each_call(pipeline: Any, seed: int) -> Any:
    """A hook before the UNet's forward that starts the library's generator anew in each call."""
    steps = CallSteps(pipeline)

    def hook(unet: Any, args: tuple[Any, ...]) -> None:
        if steps.advance() == 0:
            generator = kept_of(unet).generator(args[0].device, seed)
            unet._tome_info["args"]["generator"] = generator

    return hook
