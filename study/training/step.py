"""One training step; on a GPU, replayed from a CUDA graph.

At 32 pixels the kernels of a ResNet50 are so short that the CPU may take longer to launch them one
by one than the GPU to run them. A CUDA graph launches the whole step at once: the same kernels on
the same numbers. The plain step is the reference; tests/benchmarks/finetune.py compares the two on
a GPU, and a test covers the buffers between them.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from search_spaces import Value, value_of
from study.system.hardware import has_native_bf16
from study.training.augment import take_views

#: Plain steps before the capture: in the first ones cuDNN chooses its kernels and the optimizer
#: creates its state, which a graph must not contain.
PLAIN_STEPS = 3


class TrainingStep:
    """Forward, backward and update on one batch per call."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        inputs: Tensor,
        labels: Tensor,
        hyperparameters: Mapping[str, Value],
        *,
        capture: Callable[[Callable[[], None]], Callable[[], None]] | None = None,
    ) -> None:
        """Prepare the step.

        Args:
            model: From inputs to logits.
            optimizer: Over the model's parameters.
            inputs: All training inputs, on the training device: features, or images, which have
                four dimensions.
            labels: int64 [n].
            hyperparameters: `batch_size` and `label_smoothing` are read.
            capture: Records work and returns a function that replays it; None: a CUDA graph on a
                GPU, plain steps elsewhere.
        """
        self._model, self._optimizer = model, optimizer
        self._inputs, self._labels = inputs, labels
        self._smoothing = float(value_of(hyperparameters, "label_smoothing"))
        self._batch_size = int(hyperparameters["batch_size"])
        self._capture = capture or (capture_graph if inputs.is_cuda else None)
        self._replay: Callable[[], None] | None = None
        self._steps = 0

    def __call__(self, rows: Tensor, views: Tensor | None) -> None:
        """Take a step.

        Args:
            rows: int64 [batch], which training inputs; on their device.
            views: int64 [batch, 3], augmentation from `draw_views`; None: no augmentation.
        """
        self._steps += 1
        if len(rows) != self._batch_size:
            with without_cudnn_benchmark():
                self._work(rows, views)
            return
        if self._capture is None or self._steps <= PLAIN_STEPS:
            self._work(rows, views)
            return
        if self._replay is None:
            # The graph reads its batch from here.
            self._rows, self._views = rows.clone(), None if views is None else views.clone()
            self._replay = self._capture(lambda: self._work(self._rows, self._views))
        self._rows.copy_(rows)
        if views is not None and self._views is not None:
            self._views.copy_(views)
        self._replay()

    def _work(self, rows: Tensor, views: Tensor | None) -> None:
        # For whole rows, `index_select` is three times as fast as indexing.
        inputs = (
            self._inputs.index_select(0, rows)
            if views is None
            else take_views(self._inputs, rows, views)
        )
        logits = forward(self._model, inputs)
        loss = F.cross_entropy(logits, self._labels[rows], label_smoothing=self._smoothing)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()


def capture_graph(work: Callable[[], None]) -> Callable[[], None]:
    """Record work in a CUDA graph without running it; returns a function that runs it."""
    graph = torch.cuda.CUDAGraph()
    # Other threads of the process (Ray's) may keep using the device.
    with torch.cuda.graph(
        graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"
    ):
        work()
    return graph.replay


@contextmanager
def without_cudnn_benchmark() -> Iterator[None]:
    """Let cuDNN choose its kernels by heuristics in a block, instead of benchmarking them all.

    Benchmarking pays off for shapes that recur; an epoch's last batch comes once.
    """
    benchmark = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = benchmark


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Run a block on its own CUDA stream, from which a graph can be captured."""
    if device.type != "cuda":
        yield
        return
    stream = _stream_of(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        torch.cuda.current_stream(device).wait_stream(stream)


@lru_cache(maxsize=8)
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    """Return the same stream for every run, since cuBLAS keeps memory for each stream it sees."""
    return torch.cuda.Stream(device)


def forward(model: nn.Module, inputs: Tensor) -> Tensor:
    """Compute fp32 logits [batch, classes], with matrix products in bf16 where the device has it.

    The weights and the optimizer's state stay fp32.
    """
    if not has_native_bf16(inputs.device):
        return model(inputs.float())  # type: ignore[no-any-return]
    with torch.autocast(inputs.device.type, torch.bfloat16):
        return model(inputs).float()  # type: ignore[no-any-return]
