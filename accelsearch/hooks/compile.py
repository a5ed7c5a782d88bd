"""Compile: the same computation in less time, whatever other methods leave of it.

Four things that change no image but by rounding: convolution weights in the layout that tensor
cores read (channels last), the query, key and value projections of an attention as one product,
the repeated parts of the denoiser and the VAE's decoder compiled by `torch.compile`, and each kind
of step replayed as one CUDA graph, so that the host neither launches a thousand kernels a step nor
waits for the GPU in between.

Compiled code, graphs and rearranged weights belong to the pipeline and outlive an application:
nothing is compiled twice in one process, and what was captured lately not again. The first call
with a setting pays for it.

Source: Ansel et al., "PyTorch 2: Faster Machine Learning Through Dynamic Python Bytecode
Transformation and Graph Compilation", ASPLOS 2024; diffusers, "Accelerate inference".
"""

from __future__ import annotations

import functools
import inspect
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

from accelsearch.hooks.shared import Kept, Phases, kept_of, map_tensors, restored

if TYPE_CHECKING:
    import torch

_EAGER = "eager"
_GRAPHS = 64  # captured at most, of one module: a call needs a few, an old setting's are let go
_RECOMPILATIONS = 256  # of one function: a UNet has some twenty shapes of resnet alone


@contextmanager
def apply_compile(
    pipeline: Any,
    *,
    mode: str,
    channels_last: bool = True,
    fuse_qkv: bool | None = None,
    cuda_graphs: bool | None = None,
    phases: Phases = (),
    how: str | None = None,
) -> Iterator[None]:
    """Compile the pipeline until the exit; the first call inside waits for the compiler.

    `mode` is that of torch.compile, or "eager" to compile nothing and do the rest. `fuse_qkv` and
    `cuda_graphs` of None are where they can be: on plain attentions, and on a GPU. `phases` are
    those of the methods that are applied already, and `how` is the backend.
    """
    denoiser = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    prepared, parts = prepared_of(denoiser), parts_of(pipeline, denoiser)
    fuse_qkv = fusible(denoiser) if fuse_qkv is None else fuse_qkv
    cuda_graphs = pipeline.device.type == "cuda" if cuda_graphs is None else cuda_graphs
    prepared.applied = True
    try:
        with ExitStack() as stack:
            if channels_last:
                stack.enter_context(_channels_last(parts, prepared))
            if fuse_qkv:
                stack.enter_context(_fused_projections(denoiser, prepared))
            if mode != _EAGER:
                how = how or backend(pipeline.device.type)
                # On the CPU torch's own are faster by far.
                if channels_last and pipeline.device.type == "cuda":
                    stack.enter_context(_group_norms_channels_last(parts))
                stack.enter_context(_compiled(parts, prepared, mode, how))
            if cuda_graphs:
                setting = (mode, channels_last, fuse_qkv)
                stack.enter_context(_timesteps_on_the_host(pipeline.scheduler))
                stack.enter_context(_captured(denoiser, parts, prepared, setting, phases))
            yield
    finally:
        prepared.applied = False


def backend(device_type: str) -> str:
    """The backend of torch.compile on this machine: `inductor` where there are compilers for it.

    Inductor writes C++ on the CPU, and on a GPU Triton, which needs a C compiler to load its
    kernels. `eager` needs neither: it runs the traced graphs operator by operator, which saves
    little. (`aot_eager` would not either, but fails where convolutions choose their layout.)
    """
    names = ("c++", "g++", "clang++") if device_type == "cpu" else ("cc", "gcc", "clang")
    own = os.environ.get("CXX" if device_type == "cpu" else "CC")
    found = any(shutil.which(name) for name in ((own,) if own else names))
    has_triton = device_type == "cpu" or find_spec("triton") is not None
    return "inductor" if found and has_triton else _EAGER


class _Graph(NamedTuple):
    """Captured work: replayed, it reads the inputs, and what it returned lies in the output."""

    graph: torch.cuda.CUDAGraph
    output: Any
    held: frozenset[tuple[Hashable, torch.Size]]  # what is kept once it has run


@dataclass
class _Graphs:
    """The graphs of one module, by all that decides what it computes.

    They share one pool of memory, since none leaves anything there that a later one needs: inputs
    and kept tensors have buffers of their own, by the shapes of the inputs, and outputs are
    copied.
    """

    pool: Any
    captured: OrderedDict[Hashable, _Graph] = field(default_factory=OrderedDict)
    inputs: dict[Hashable, Any] = field(default_factory=dict)
    buffers: dict[Hashable, dict[Hashable, torch.Tensor]] = field(default_factory=dict)

    def run(
        self,
        forward: Callable[..., Any],
        setting: Hashable,
        phases: Phases,
        kept: Kept,
        call: tuple[tuple[Any, ...], dict[str, Any]],
    ) -> Any:
        """What `forward` returns for these arguments, captured if it has not been before."""
        import torch

        shapes, device = _described(call), call[0][0].device
        if shapes not in self.inputs:
            self.inputs[shapes] = map_tensors(
                lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device), call
            )
        inputs = self.inputs[shapes]
        _copy(call, inputs)
        kept.buffers = self.buffers.setdefault(shapes, {})
        told = tuple((name, phase()) for name, phase in phases if phase)
        key = (setting, shapes, told, kept.held)
        if key in self.captured:
            self.captured.move_to_end(key)
        else:
            self.captured[key] = self._capture(forward, kept, inputs)
            if len(self.captured) > _GRAPHS:
                self.captured.popitem(last=False)
        found = self.captured[key]
        found.graph.replay()
        kept.held = found.held
        return map_tensors(torch.clone, found.output)

    def _capture(self, forward: Callable[..., Any], kept: Kept, inputs: Any) -> _Graph:
        import torch

        held = kept.held
        chances = {one: one.get_state() for one in kept.generators.values()}
        args, kwargs = inputs
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(args[0].device):  # which need not be the current one
            # Once outside of a graph: what compiles, chooses algorithms or allocates for good does
            # it here. On another stream, because nothing of the current one may be captured.
            current, stream = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                forward(*args, **kwargs)
            current.wait_stream(stream)
            kept.held = held
            for generator, state in chances.items():
                generator.set_state(state)
                graph.register_generator_state(generator)
            with torch.cuda.graph(graph, pool=self.pool):
                output = forward(*args, **kwargs)
        captured = _Graph(graph, output, kept.held)
        kept.held = held
        return captured


@dataclass
class Prepared:
    """What has been made for one denoiser and serves every application."""

    applied: bool = False
    rearranged: dict[int, torch.Tensor] = field(default_factory=dict)  # by parameter
    fused: dict[Any, dict[str, Any]] = field(default_factory=dict)  # attention -> projections
    code: dict[Hashable, Callable[..., Any]] = field(default_factory=dict)  # by module and mode
    graphs: dict[str, _Graphs] = field(default_factory=dict)  # by part

    def compiled(self, module: Any, call: Callable[..., Any], mode: str, how: str) -> Any:
        """The call, compiled; the same object each time, since torch knows its code by that."""
        import torch

        key = (module, vars(module).get("forward"), mode, how)
        if key not in self.code:
            # A backend that generates no code has no modes. Sizes left open would cost speed.
            options: dict[str, Any] = {"mode": mode} if how == "inductor" else {"backend": how}
            self.code[key] = torch.compile(call, dynamic=False, **options)
        return self.code[key]

    @property
    def held_bytes(self) -> int:
        tensors = list(self.rearranged.values())
        for projections in self.fused.values():
            tensors += [one for module in projections.values() for one in module.parameters()]
        for graphs in self.graphs.values():
            for inputs in graphs.inputs.values():
                map_tensors(tensors.append, inputs)
            tensors += [one for buffers in graphs.buffers.values() for one in buffers.values()]
        pools = {graphs.pool for graphs in self.graphs.values()}
        pooled = sum(
            int(segment["total_size"])
            for segment in (_segments() if pools else ())
            if tuple(segment["segment_pool_id"]) in pools
        )
        return pooled + sum(one.untyped_storage().nbytes() for one in tensors)


def _segments() -> list[dict[str, Any]]:
    import torch

    found: list[dict[str, Any]] = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
    return found


_PREPARED: WeakKeyDictionary[Any, Prepared] = WeakKeyDictionary()


def prepared_of(denoiser: Any) -> Prepared:
    """What has been made for this denoiser, by all applications."""
    return _PREPARED.setdefault(denoiser, Prepared())


def parts_of(pipeline: Any, denoiser: Any) -> tuple[Any, ...]:
    """The denoiser, and the VAE's decoder if it stays as it is during a call.

    SDXL's pipeline moves a VAE in half precision, which would overflow, to full precision and
    back in every call: what was captured with the old weights would be wrong.
    """
    import torch

    vae = pipeline.vae
    moves = (
        vae.dtype == torch.float16 and vae.config.force_upcast and hasattr(pipeline, "upcast_vae")
    )
    return (denoiser,) if moves else (denoiser, vae.decoder)


def fusible(denoiser: Any) -> bool:
    """Whether every attention has a plain processor, of which there is a fused kind."""
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    plain = (AttnProcessor, AttnProcessor2_0)
    return all(type(one.processor) in plain for one in _all_attentions(denoiser))


def _all_attentions(denoiser: Any) -> list[Any]:
    from diffusers.models.attention_processor import Attention

    return [module for module in denoiser.modules() if isinstance(module, Attention)]


@contextmanager
def _channels_last(parts: tuple[Any, ...], prepared: Prepared) -> Iterator[None]:
    """Put copies of the convolutions' weights, channels last, in the place of the weights."""
    import torch

    weights = [one for part in parts for one in part.parameters() if one.ndim == 4]
    originals = [weight.data for weight in weights]
    try:
        for weight, original in zip(weights, originals, strict=True):
            if original.is_contiguous(memory_format=torch.channels_last):
                continue  # of 1 x 1, for example: both layouts are one
            rearranged = prepared.rearranged.get(id(weight))
            if rearranged is None or not _alike(rearranged, original):
                rearranged = original.to(memory_format=torch.channels_last)
                prepared.rearranged[id(weight)] = rearranged
            else:
                rearranged.copy_(original)  # which may have changed since
            weight.data = rearranged
        yield
    finally:
        for weight, original in zip(weights, originals, strict=True):
            weight.data = original


@contextmanager
def _group_norms_channels_last(parts: tuple[Any, ...]) -> Iterator[None]:
    """Let the group norms compute over what lies channels last as it lies.

    Written as torch writes it, over groups of whole channels, the compiler copies the input to
    channels first and the output back: on an H200 that is 17 % of a resnet block of SD 1.5, and
    a third of the last block of its decoder.
    """
    from torch.nn import GroupNorm

    own = _channels_last_norm()
    found = [
        module
        for part in parts
        for module in part.modules()
        if type(module) is GroupNorm and module.affine and "forward" not in vars(module)
    ]
    try:
        for module in found:
            module.__class__ = own
        yield
    finally:
        for module in found:
            module.__class__ = GroupNorm


@functools.cache
def _channels_last_norm() -> Any:
    """torch's GroupNorm, computed in float32 over [batch, pixels, groups, channels a group]."""
    import torch

    class ChannelsLastGroupNorm(torch.nn.GroupNorm):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            channels_last: Any = input.movedim(1, -1)
            grouped = channels_last.flatten(1, -2).unflatten(-1, (self.num_groups, -1)).float()
            variance, mean = torch.var_mean(grouped, (1, 3), correction=0, keepdim=True)
            normed = ((grouped - mean) * torch.rsqrt(variance + self.eps)).flatten(2)
            output = normed * self.weight.float() + self.bias.float()
            found: torch.Tensor = output.to(input.dtype).reshape(channels_last.shape).movedim(-1, 1)
            return found

    return ChannelsLastGroupNorm


@contextmanager
def _fused_projections(denoiser: Any, prepared: Prepared) -> Iterator[None]:
    """Give every attention its fused projections, and the processor that uses them."""
    from diffusers.models.attention_processor import FusedAttnProcessor2_0

    attentions = _all_attentions(denoiser)
    before = {attention: dict(attention._modules) for attention in attentions}
    with restored(attentions, "processor", "fused_projections"):
        try:
            for attention in attentions:
                attention.fuse_projections()
                made = {
                    name: module
                    for name, module in attention._modules.items()
                    if name not in before[attention]
                }
                fused = prepared.fused.setdefault(attention, made)
                for name, module in made.items():
                    pairs = zip(fused[name].parameters(), module.parameters(), strict=True)
                    for kept, fresh in pairs:
                        # At the address that graphs know, with what the weights are now.
                        kept.data = kept.data.copy_(fresh) if _alike(kept, fresh) else fresh.data
                attention._modules.update(fused)
                attention.processor = FusedAttnProcessor2_0()
            yield
        finally:
            for attention in attentions:
                for name in attention._modules.keys() - before[attention].keys():
                    del attention._modules[name]


@contextmanager
def _compiled(parts: tuple[Any, ...], prepared: Prepared, mode: str, how: str) -> Iterator[None]:
    """Compile the regions of the denoiser, and a decoder as a whole, being called once."""
    from torch._dynamo import config

    # Names and defaults of the limit differ between versions; past it, torch falls back silently.
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    denoiser, *decoders = parts
    regions = list(_regions(denoiser))
    with (
        restored(regions, "_compiled_call_impl"),
        restored(decoders, "forward"),
        config.patch({limit: _RECOMPILATIONS}),
    ):
        for region in regions:
            region._compiled_call_impl = prepared.compiled(region, region._call_impl, mode, how)
        for decoder in decoders:
            decoder.forward = prepared.compiled(decoder, decoder.forward, mode, how)
        yield


def _regions(module: Any) -> Iterator[Any]:
    """The largest parts worth compiling that no other method has changed."""
    from diffusers.models.attention import BasicTransformerBlock, FeedForward
    from diffusers.models.attention_processor import Attention
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel
    from torch.nn import GroupNorm

    kinds = (
        Transformer2DModel,
        BasicTransformerBlock,
        ResnetBlock2D,
        Attention,
        FeedForward,
        GroupNorm,  # torch's own copies what lies channels last
    )
    if isinstance(module, kinds) and not any(_is_changed(one) for one in module.modules()):
        yield module
        return
    for child in module.children():
        yield from _regions(child)


def _is_changed(module: Any) -> bool:
    """Whether the module runs other than its class in diffusers or torch says."""
    kind = type(module)
    own = kind.__module__.partition(".")[0] in ("diffusers", "torch")
    own |= kind is _channels_last_norm()
    # Compiled code does not notice that hooks come and go.
    hooked = module._forward_hooks or module._forward_pre_hooks
    return not own or bool(hooked) or "forward" in vars(module)


@contextmanager
def _captured(
    denoiser: Any,
    parts: tuple[Any, ...],
    prepared: Prepared,
    setting: Hashable,
    phases: Phases,
) -> Iterator[None]:
    """Replay the denoiser's and the decoder's work from CUDA graphs."""
    import torch

    def replayed(part: Any, kept: Kept, phases: Phases) -> Callable[..., Any]:
        forward = part.forward
        name = type(part).__name__
        if name not in prepared.graphs:
            prepared.graphs[name] = _Graphs(torch.cuda.graph_pool_handle())
        graphs = prepared.graphs[name]
        state = _state(part)

        def call(*args: Any, **kwargs: Any) -> Any:
            return graphs.run(forward, (setting, state), phases, kept, (args, kwargs))

        return call

    kept = kept_of(denoiser)
    with restored(parts, "forward"):
        try:
            for part in parts:
                is_denoiser = part is denoiser
                part.forward = replayed(
                    part, kept if is_denoiser else Kept(), phases if is_denoiser else ()
                )
            yield
        finally:
            kept.buffers = None


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


def _state(part: Any) -> int:
    """All of a module that a graph is captured with: where its weights lie, and its numbers.

    FreeU's factors and the scales of LoRAs are such numbers.
    """
    plain = (bool, int, float, str, type(None))

    def numbers(value: Any) -> Hashable:
        if isinstance(value, dict):
            return tuple((str(key), one) for key, one in value.items() if isinstance(one, plain))
        return value if isinstance(value, plain) else None

    attributes = tuple(
        (name, numbers(value))
        for module in part.modules()
        for name, value in vars(module).items()
        if not name.startswith("_")
    )
    return hash((tuple(one.data_ptr() for one in part.parameters()), attributes))


@contextmanager
def _timesteps_on_the_host(scheduler: Any) -> Iterator[None]:
    """Leave the timesteps on the CPU: schedulers look constants up by them, on the CPU, each step.

    From the GPU, each look-up would wait for all the work before it.
    """
    set_timesteps = scheduler.set_timesteps
    if "device" not in inspect.signature(set_timesteps).parameters:
        yield
        return

    @functools.wraps(set_timesteps)
    def on_the_host(*args: Any, device: Any = None, **kwargs: Any) -> None:
        set_timesteps(*args, device="cpu", **kwargs)

    with restored((scheduler,), "set_timesteps"):
        scheduler.set_timesteps = on_the_host
        yield


def _described(value: Any) -> Hashable:
    """All of a call's arguments that a graph is captured with, but for what the tensors hold.

    Their layouts neither: they change in the first steps, and the graph's inputs have one.
    """
    import torch

    if isinstance(value, torch.Tensor):
        return (tuple(value.shape), value.dtype)
    if isinstance(value, tuple | list):
        return tuple(_described(one) for one in value)
    if isinstance(value, dict):
        return tuple((name, _described(one)) for name, one in sorted(value.items()))
    return value if isinstance(value, Hashable) else repr(value)


def _copy(source: Any, target: Any) -> None:
    """Copy every tensor of one nested value into the other's, without waiting."""
    import torch

    if isinstance(source, torch.Tensor):
        target.copy_(source, non_blocking=True)
    elif isinstance(source, tuple | list):
        for one, other in zip(source, target, strict=True):
            _copy(one, other)
    elif isinstance(source, dict):
        for name, one in source.items():
            _copy(one, target[name])
