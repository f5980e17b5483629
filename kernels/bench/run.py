"""Time every op on this machine's GPU: plain PyTorch, torch.compile of it, our kernel.

    python kernels/bench/run.py [--op NAME] [--preset NAME] [--no-compile] [--batch N] [--json]

One run, one device, bfloat16; the L2 cache is overwritten before each call. Each rate stands beside
that of a copy or a matrix product in the same run. An op that differs from its definition gets no
speed-up. The clocks are left as they are.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[1]))

from cmdgen_kernels.language import triton
from cmdgen_kernels.samples import OPS, Op, Sizes, errors

BATCH = 8
PRESETS = ("mini", "cmd-sd15", "cmd-sd21")
# sizes as `samples.py` has them, without the batch, which comes first there
CASES = (
    # C, T, H, W
    ("content_frame", "latents", (8, 16, 24, 24), (4, 16, 64, 64), (4, 16, 64, 128)),
    # T, H, W, D, K
    ("motion_latents", "tokens", (16, 8, 8, 160, 8), (16, 32, 32, 384, 8), (16, 32, 64, 384, 8)),
    ("motion_tokens", "tokens", (16, 8, 8, 160, 8), (16, 32, 32, 384, 8), (16, 32, 64, 384, 8)),
    # N, L, D, M: where the UNet first attends
    ("gated_attention", "UNet", (4, 144, 24, 256), (8, 4096, 40, 256), (5, 8192, 64, 256)),
    # C, H, W
    ("group_norm_silu", "UNet, level 0", (64, 24, 24), (320, 64, 64), (320, 64, 128)),
    ("group_norm_silu", "UNet, middle", (128, 6, 6), (1280, 8, 8), (1280, 8, 16)),
    ("group_norm_silu", "VAE, last level", (32, 96, 96), (128, 512, 512), (128, 512, 1024)),
    ("convolution", "VAE, last level", (32, 96, 96), (128, 512, 512), (128, 512, 1024)),
    ("doubled_convolution", "VAE, last doubling", (64, 48, 48), (256, 256, 256), (256, 256, 512)),
    # L, D
    ("layer_norm", "motion model", (80, 256), (512, 1152), (512, 1152)),
    ("geglu", "UNet, level 0", (576, 256), (4096, 1280), (8192, 1280)),
    # mini's middle is narrower, and fused attention's
    ("wide_attention", "VAE, middle", (64, 264), (4096, 512), (8192, 512)),
    # T, P, N, D: clips of 256x256, 512x512 and 576x1024; of 288x512, 576x1024 and that in 25 frames
    ("time_attention", "AnimateDiff, level 0", (16, 1024, 8, 40), (16, 4096, 8, 40), (16, 9216, 8, 40)),
    ("time_attention", "AnimateDiff, level 2", (16, 64, 8, 160), (16, 256, 8, 160), (16, 576, 8, 160)),
    ("time_attention", "SVD, level 0", (14, 2304, 5, 64), (14, 9216, 5, 64), (25, 9216, 5, 64)),
    # N, D: frames are the batch
    ("rotate", "decoder", (64, 320), (1024, 768), (2048, 768)),
    # H, W
    ("yuv420p", "frames", (96, 96), (512, 512), (512, 1024)),
)
# compiling takes the minutes: gradients are timed at this preset's sizes only
TRAINED = "cmd-sd21"
NAMED = {op.name: op for op in OPS}
# FAVOR+ against softmax attention: batch, heads, head width, features
ATTENTION = (2, 10, 64, 256)
LENGTHS = tuple(2**i for i in range(10, 16))


class Time(NamedTuple):
    """Microseconds: the median call, the limits of the fastest and the slowest tenth."""

    median: float
    low: float
    high: float


Clock = Callable[[Callable[[], object]], Time]
Compile = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]


class GpuClock:
    """Time calls by CUDA events, for 0.2 seconds."""

    def __init__(self) -> None:
        # far more than any L2 cache
        self.cache = torch.empty(2**27, dtype=torch.int64, device="cuda")

    def __call__(self, run: Callable[[], object]) -> Time:
        """Time `run`. The first calls, which compile it, do not count."""
        for _ in range(3):
            run()
        rough = max(statistics.median(self._times(run, 5)), 1.0)
        times = self._times(run, min(max(int(2e5 / rough), 10), 200))
        tenths = statistics.quantiles(times, n=10)
        return Time(statistics.median(times), tenths[0], tenths[-1])

    def _times(self, run: Callable[[], object], count: int) -> list[float]:
        events = []
        torch.cuda.synchronize()
        for _ in range(count):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.cache.zero_()
            # read it too: else the call would wait for lines that are written back
            self.cache.amax()
            # a millisecond in which the host can queue the whole call
            torch.cuda._sleep(2_000_000)
            start.record()
            run()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return [1000 * start.elapsed_time(end) for start, end in events]


class Limits(NamedTuple):
    """Measured limits of the device: GB/s of a large copy, TFLOP/s of a large matrix product."""

    copy: float
    product: float
    # its bytes: a tensor that fits is read from memory once
    cache: int


class Bench(NamedTuple):
    """Hold the tools of a measurement, its limits, its dtype and its device."""

    clock: Clock
    # compiling is most of what a run takes
    compile: Compile | None
    limits: Limits
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"


def measure_limits(clock: Clock, *, size: int, side: int, cache: int, device: str) -> Limits:
    """Copy `size` bytes and square a matrix of `side` rows."""
    source = torch.empty(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copy = 2 * size / clock(lambda: target.copy_(source)).median / 1e3
    a = torch.randn(side, side, dtype=torch.bfloat16, device=device)
    return Limits(copy, 2 * side**3 / clock(lambda: a @ a).median / 1e6, cache)


def bytes_moved(op: Op, inputs: tuple[Tensor, ...], *, backward: bool, cache: int) -> int:
    """Count the bytes that the op must move: each input read once, each output written once."""

    def size(tensors: Iterable[Tensor]) -> int:
        return sum(x.numel() * x.element_size() for x in tensors)

    shapes = [x.to("meta") for x in inputs]
    read, written = size(shapes), size(tree_leaves(op.reference(*shapes)))
    total = read + written
    # moments, and sums of the gradient, need a read of their own where no cache keeps x
    again = size(inputs[:1]) if op.name == "group_norm_silu" and size(inputs[:1]) > cache else 0
    total += again
    if backward:
        # the upstream gradient is read, the inputs' gradients are written
        total += written + size(inputs[: op.leaves]) + 2 * again
        # the other ops are linear in their large input and do not read it again
        if op.name in ("content_frame", "group_norm_silu"):
            total += read
    return total


def flops(name: str, sizes: Sizes, *, backward: bool) -> int:
    """Count operations: two products of L L D, or FAVOR+'s four of L M D forward and eight backward."""
    if name == "wide_attention":
        batch, length, width = sizes
        return 4 * batch * length**2 * width
    return (12 if backward else 4) * 2 * math.prod(sizes)


def caller(op: Op, run: Callable[..., Tensor], inputs: tuple[Tensor, ...], *, backward: bool) -> Callable[[], object]:
    """Return the call that is timed: forward, or forward and backward."""
    if not backward:
        return lambda: run(*inputs)
    leaves, rest = [x.detach().requires_grad_() for x in inputs[: op.leaves]], inputs[op.leaves :]
    upstream = torch.randn_like(run(*leaves, *rest))
    return lambda: torch.autograd.grad(run(*leaves, *rest), leaves, upstream)


def _check(bench: Bench, op: Op, sizes: Sizes, *, backward: bool) -> tuple[dict[str, Any], tuple[Tensor, ...]]:
    """() -> a row without times, and the inputs. It counts if the op's kernel runs and is right."""
    inputs = op.inputs(sizes, bench.dtype, bench.device)
    found = errors(op, inputs, backward=backward)
    worst = max(found, key=lambda error: (not error.agrees, error.size))
    row = {"sizes": sizes, "pass": "training" if backward else "forward", **worst._asdict()}
    row |= {"parity": worst.agrees, "obstacle": op.obstacle(*inputs)}
    return row | {"counts": worst.agrees and row["obstacle"] is None}, inputs


def measure(bench: Bench, name: str, preset: str, place: str, sizes: Sizes, *, backward: bool) -> dict[str, Any]:
    """Measure a row of the table of ops."""
    op = NAMED[name]
    row, inputs = _check(bench, op, sizes, backward=backward)
    row = {"op": name, "preset": preset, "place": place, **row}
    compiled = bench.compile and bench.compile(op.reference)
    for who, run in {"reference": op.reference, "compiled": compiled, "ours": op.run}.items():
        row[who] = run and bench.clock(caller(op, run, inputs, backward=backward))._asdict()
    ours = row["ours"]["median"]
    if op.name in ("gated_attention", "wide_attention"):
        row |= {"unit": "TFLOP/s", "limit": bench.limits.product}
        row["rate"] = flops(name, sizes, backward=backward) / ours / 1e6
    else:
        moved = bytes_moved(op, inputs, backward=backward, cache=bench.limits.cache)
        row |= {"unit": "GB/s", "limit": bench.limits.copy, "bytes": moved}
        row["rate"] = row["bytes"] / ours / 1e3
    row["percent"] = 100 * row["rate"] / row["limit"]
    for other in ("reference", "compiled"):
        row[f"over_{other}"] = row[other]["median"] / ours if row["counts"] and row[other] else None
    return row


def measure_attention(bench: Bench, sizes: Sizes, *, backward: bool) -> dict[str, Any]:
    """Measure a row of the second table: FAVOR+ beside cuDNN's and flash softmax attention."""
    op = NAMED["gated_attention"]
    row, inputs = _check(bench, op, sizes, backward=backward)
    row["ours"] = bench.clock(caller(op, op.run, inputs, backward=backward))._asdict()
    ours = row["ours"]["median"]
    row["rate"] = flops(op.name, sizes, backward=backward) / ours / 1e6
    row |= {"softmax": {}, "refused": {}}
    for name in ("CUDNN_ATTENTION", "FLASH_ATTENTION"):
        with sdpa_kernel(getattr(SDPBackend, name)):
            try:
                time = bench.clock(caller(op, _softmax, inputs, backward=backward))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                # each backend has its own message for inputs that it does not take
                row["refused"][name] = str(error).splitlines()[0]
            else:
                row["softmax"][name] = time._asdict()
    best = min((time["median"] for time in row["softmax"].values()), default=None)
    row["over_softmax"] = best / ours if best and row["counts"] else None
    return row


def _softmax(q: Tensor, k: Tensor, v: Tensor, projection: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def summarise(rows: list[dict[str, Any]], batch: int) -> dict[str, Any]:
    """Compute the figures that a reader looks for first."""
    gains = [row["over_compiled"] for row in rows if row["over_compiled"]]
    bound = [row for row in rows if row["unit"] == "GB/s" and row["preset"] == TRAINED]
    return {
        "geometric_mean_over_compiled": statistics.geometric_mean(gains) if gains else None,
        "wrong": [_name(row) for row in rows if not row["parity"]],
        "slower_than_compiled": [_name(r) for r in rows if (r["over_compiled"] or 1) < 1],
        "below_80_percent_of_copy": [_name(row) for row in bound if batch >= BATCH and row["percent"] < 80],
    }


def _name(row: dict[str, Any]) -> str:
    return f"{row['op']} {row['preset']} {row['place']} {row['pass']}"


def line(row: dict[str, Any]) -> str:
    """Format a row of the table of ops."""
    text = "".join(_show(row[name]) for name in ("reference", "compiled", "ours"))
    text += "".join(_gain(row[key]) for key in ("over_reference", "over_compiled"))
    text += f"{row['rate']:9.0f} {row['unit']:8}{row['percent']:4.0f} %"
    return f"{_name(row):54}{text}{_trouble(row)}"


def attention_line(row: dict[str, Any]) -> str:
    """Format a row of the table of attentions."""
    batch, heads, length, width, features = row["sizes"]
    text = f"B={batch} N={heads} L={length:<6}D={width:<4}M={features:<5}{row['pass']:9}"
    text += f"FAVOR+ {_show(row['ours'])}{row['rate']:6.0f} TFLOP/s"
    for name, time in row["softmax"].items():
        text += f"  {name.split('_')[0].lower()}{_show(time)}"
    return text + _gain(row["over_softmax"]) + _trouble(row)


def _show(time: dict[str, float] | None) -> str:
    if time is None:
        return f"{'-':>17}"
    spread = 50 * (time["high"] - time["low"]) / time["median"]
    return f"{time['median']:10.1f} ±{spread:4.1f}%"


def _gain(gain: float | None) -> str:
    return f"{gain:8.2f}x" if gain else f"{'-':>9}"


def _trouble(row: dict[str, Any]) -> str:
    wrong = "" if row["parity"] else f"  WRONG: error {row['size']:.1e} > {row['allowed']:.1e}"
    return wrong + (f"  no kernel: {row['obstacle']}" if row["obstacle"] else "")


def compile_anew(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compile a function for one set of sizes."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False, fullgraph=True)


def run(bench: Bench, *, op: str | None, preset: str | None, batch: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure every row, or those of one op or preset, and summarise them."""
    result: dict[str, Any] = {"rows": [], "attention": []}
    for name, place, *columns in CASES:
        for column, sizes in zip(PRESETS, columns, strict=True):
            trained = column == TRAINED and NAMED[name].leaves > 0
            chosen = op in (None, name) and preset in (None, column)
            for backward in (False, True)[: 1 + trained] if chosen else ():
                sized = batch, *sizes
                row = measure(bench, name, column, place, sized, backward=backward)
                result["rows"].append(row)
                say(line(row))
    batches, heads, width, features = ATTENTION
    for length in LENGTHS if op in (None, "gated_attention") else ():
        for backward in (False, True):
            sized = batches, heads, length, width, features
            result["attention"].append(measure_attention(bench, sized, backward=backward))
            say(attention_line(result["attention"][-1]))
    result["summary"] = summarise(result["rows"], batch)
    say("\n".join(f"{name}: {value}" for name, value in result["summary"].items()))
    return result


def main() -> None:
    """Parse the command line and time the ops, if there is a GPU."""
    parser = argparse.ArgumentParser(description="Time the kernels on this machine's GPU.")
    parser.add_argument("--op", choices=list(NAMED))
    parser.add_argument("--preset", choices=PRESETS, help="its sizes alone [all]")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes minutes")
    parser.add_argument("--batch", type=int, default=BATCH, help=f"clips at a time [{BATCH}]")
    parser.add_argument("--json", action="store_true", help="one object on stdout")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no GPU here: nothing to time", file=sys.stderr)
        return

    say = partial(print, file=sys.stderr if arguments.json else sys.stdout, flush=True)
    torch.manual_seed(0)
    gpu, clock = torch.cuda.get_device_properties(0), GpuClock()
    limits = measure_limits(clock, size=2**30, side=8192, cache=gpu.L2_cache_size, device="cuda")
    about = {"device": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "clocks": "as found"}
    about |= {"torch": torch.__version__, "triton": triton.__version__}
    about["cuda"] = str(torch.version.cuda)
    say(", ".join(f"{name} {value}" for name, value in about.items()))
    batch = arguments.batch
    say(f"copy {limits.copy:.0f} GB/s, product {limits.product:.0f} TFLOP/s, batch {batch}")
    say("microseconds, ± half of what lies between the fastest and the slowest tenth\n")
    columns = "".join(f"{name:>17}" for name in ("reference", "torch.compile", "ours"))
    say(f"{'':54}{columns}   times as fast as both   rate, of the limit")
    bench = Bench(clock, None if arguments.no_compile else compile_anew, limits)
    result = run(bench, op=arguments.op, preset=arguments.preset, batch=batch, say=say)
    if arguments.json:
        print(json.dumps({**about, "batch": batch, "limits": limits._asdict(), **result}))


if __name__ == "__main__":
    main()
