"""Speed of computing features, compared with alternatives and with a hardware limit.

    python -m tests.benchmarks.features [--images 512] [--image-size 32] [--repeats 5]

All compute the features of the same images with all cores, from bytes, in batches of 128 (`ours` in
batches of `features.extract.batch_size_for`, which is 256 at 32 px and 56 at 96 px):

- `plain`: torchvision's unmodified ResNet50, fp32, as a training script would run it
- `ours`: `study.features.extract.compute_features`
- `inductor`: the same folded backbone under `torch.compile` with its weights frozen
- `onnxruntime`: the same folded backbone as an ONNX file that torch exports, in fp32
- `eager`: the same folded backbone in eager PyTorch, channels last

All but `plain` and `onnxruntime` use bf16 if the processor supports it natively. Compiling and
exporting are not included and printed separately. The limit is the time of the convolutions'
operations at the rate that this machine reaches on large matrix products of the same type. `ours`
folds and serializes the backbone each time, which takes 0.1 s in bf16 and 1 s in fp32; a study does
so once.

Measured on 2 cores of an Intel Xeon with AMX, bf16, torch 2.15.0, onnxruntime 1.32.0, n = 5; at 32
px (`--images 5120`):

    |             | images/s |         time / ours |           time / limit |
    | ----------- | -------: | ------------------: | ---------------------: |
    | plain       |      977 | 6.53 (6.22 to 6.77) | 17.18 (16.80 to 17.43) |
    | ours        |    6,303 | 1.00 (1.00 to 1.00) |    2.66 (2.48 to 2.76) |
    | eager       |    1,617 | 3.81 (3.68 to 4.18) | 10.38 (10.03 to 10.45) |
    | inductor    |    1,965 | 3.21 (2.96 to 3.45) |    8.54 (8.07 to 8.60) |
    | onnxruntime |    1,000 | 6.21 (5.99 to 6.94) | 16.78 (16.29 to 17.24) |
    | limit       |   16,777 |                     |                      1 |

and at 96 px (`--images 1280 --image-size 96`); `ours` keeps freed memory, which also benefits
whatever runs after it in the same process:

    |             | images/s |         time / ours |           time / limit |
    | ----------- | -------: | ------------------: | ---------------------: |
    | plain       |      141 | 5.59 (5.46 to 5.67) | 12.45 (12.14 to 12.97) |
    | ours        |      801 | 1.00 (1.00 to 1.00) |    2.20 (2.17 to 2.32) |
    | eager       |      440 | 1.81 (1.71 to 1.87) |    3.99 (3.92 to 4.12) |
    | inductor    |      812 | 0.98 (0.95 to 1.00) |    2.17 (2.10 to 2.26) |
    | onnxruntime |      192 | 4.04 (4.00 to 4.22) |    9.18 (8.85 to 9.27) |
    | limit       |    1,758 |                     |                      1 |

On processors without native bf16, `ours` uses ONNX Runtime because of these measurements, in which
`ours` was still eager PyTorch (`--images 2560`, n = 5, 2 cores of an AMD EPYC with AVX2, fp32):

    |             | images/s |         time / ours |        time / limit |
    | ----------- | -------: | ------------------: | ------------------: |
    | plain       |      319 | 1.14 (1.10 to 1.16) | 1.39 (1.36 to 1.42) |
    | ours        |      360 | 1.00 (1.00 to 1.00) | 1.24 (1.22 to 1.25) |
    | eager       |      359 | 1.00 (0.98 to 1.03) | 1.24 (1.23 to 1.25) |
    | inductor    |      392 | 0.92 (0.91 to 0.93) | 1.14 (1.13 to 1.14) |
    | onnxruntime |      418 | 0.86 (0.86 to 0.87) | 1.07 (1.06 to 1.07) |
    | limit       |      446 |                     |                   1 |
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from study.data.load import load_dataset
from study.features.extract import Precision, compute_features, fold_batch_norms
from study.models.backbone import build_backbone
from study.models.preprocess import Preprocess
from study.models.weights import load_weights
from study.system.hardware import cpu_count, has_native_bf16
from tests.benchmarks.paired import Spread, about, in_turn, ratio, show

CPU = torch.device("cpu")
BATCH = 128


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(about("onnxruntime"))

    weights = load_weights("auto")
    preprocess = replace(weights.preprocess, image_size=options.image_size)
    pixels = load_dataset("cifar10").pixels[: options.images // BATCH * BATCH]
    backbone = build_backbone(weights.state, weights.architecture)
    precision: Precision = "bf16" if has_native_bf16(CPU) else "fp32"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32

    def ours() -> Tensor:
        return compute_features(backbone, pixels, preprocess, precision=precision, device=CPU)

    begun = time.perf_counter()
    compiled = compile_net(backbone, dtype)
    run_batches(compiled, pixels, preprocess, dtype)
    compiling = time.perf_counter() - begun
    session, eager = onnx_net(backbone, options.image_size), eager_net(backbone, dtype)
    contenders: dict[str, Callable[[], Tensor]] = {
        "plain": lambda: run_batches(backbone, pixels, preprocess, torch.float32),
        "ours": ours,
        "eager": lambda: run_batches(eager, pixels, preprocess, dtype),
        "inductor": lambda: run_batches(compiled, pixels, preprocess, dtype),
        "onnxruntime": lambda: run_batches(session, pixels, preprocess, torch.float32),
    }
    reference = contenders["plain"]()
    for name, compute in contenders.items():
        check_alike(name, compute().float(), reference, precision)
    seconds = in_turn(contenders, options.repeats)
    floor = operations(backbone, options.image_size) * len(pixels) / matrix_rate(dtype)
    rows = [
        [
            name,
            f"{len(pixels) / spread.middle:,.0f}",
            ratio(spread, seconds["ours"]).shown(),
            Spread(tuple(value / floor for value in spread.values)).shown(),
        ]
        for name, spread in seconds.items()
    ]
    rows.append(["limit", f"{len(pixels) / floor:,.0f}", "", "1"])
    print(f"{len(pixels)} images at {options.image_size} px, {precision}, n = {options.repeats};")
    print(f"compiling took {compiling:.0f} s")
    print(show(["", "images/s", "time / ours", "time / limit"], rows))


def run_batches(
    net: Callable[[Tensor], Tensor], pixels: np.ndarray, preprocess: Preprocess, dtype: torch.dtype
) -> Tensor:
    """Compute the features of all images, batch by batch."""
    found = []
    with torch.inference_mode():
        for start in range(0, len(pixels), BATCH):
            images = preprocess(torch.from_numpy(pixels[start : start + BATCH]))
            found.append(net(images.to(dtype=dtype)))
    return torch.cat(found)


def eager_net(backbone: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Return the folded backbone in eager PyTorch."""
    layout = torch.channels_last
    net = fold_batch_norms(backbone).to(dtype=dtype, memory_format=layout)  # type: ignore[call-overload]
    return lambda images: net(images.to(memory_format=layout))


def compile_net(backbone: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Return the folded backbone under torch.compile, with its weights as constants."""
    import torch._inductor.config

    torch._inductor.config.freezing = True
    layout = torch.channels_last
    net = fold_batch_norms(backbone).to(dtype=dtype, memory_format=layout)  # type: ignore[call-overload]
    compiled = torch.compile(net)

    def run(images: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = compiled(images.to(memory_format=layout))
        return found

    return run


def onnx_net(backbone: nn.Module, size: int) -> Callable[[Tensor], Tensor]:
    """Return the folded backbone in ONNX Runtime, on all cores."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "backbone.onnx"
        program = torch.onnx.export(
            fold_batch_norms(backbone),
            (torch.zeros(BATCH, 3, size, size),),
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        program.save(path, external_data=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = cpu_count()
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def check_alike(name: str, found: Tensor, reference: Tensor, precision: Precision) -> None:
    """Check that a contender computes the same features up to rounding, as test_extract.py does.

    Features are always rounded to bf16, which alone makes a difference of about 0.002.
    """
    apart = float((found - reference).norm() / reference.norm())
    assert apart < {"bf16": 0.03, "fp32": 0.005}[precision], f"{name} differs by {apart:.3f}"


def operations(backbone: nn.Module, size: int) -> float:
    """Return the floating-point operations per image."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        backbone(torch.zeros(2, 3, size, size))
    return float(counter.get_total_flops()) / 2


def matrix_rate(dtype: torch.dtype, side: int = 2048, repeats: int = 8) -> float:
    """Return the operations per second of a large matrix product, with all threads."""
    first, second = torch.randn(side, side).to(dtype), torch.randn(side, side).to(dtype)
    best = 0.0
    for _ in range(repeats):
        begun = time.perf_counter()
        first @ second
        best = max(best, 2 * side**3 / (time.perf_counter() - begun))
    return best


if __name__ == "__main__":
    main()
