from collections.abc import Sequence

from torch import Tensor

def simd_level() -> str: ...
def best_simd_level() -> str: ...
def select_simd_level(name: str) -> bool: ...

class StepTensors:
    def __init__(
        self,
        params: list[int],
        grads1: list[int],
        grads2: list[int],
        kept1: list[int],
        kept2: list[int],
        sizes: list[int],
        param_dtypes: list[int],
        grad_dtypes: list[int],
    ) -> None: ...
    @property
    def all_float64(self) -> bool: ...
    @staticmethod
    def apart(steps: list[StepTensors]) -> bool: ...
    def columns(
        self,
    ) -> tuple[list[int], list[int], list[int], list[int], list[int], list[int], list[int], list[int]]: ...
    def step(
        self,
        rate: float,
        c1: float,
        c2: float,
        weight_decay: float,
        momentum64: float,
        momentum32: float,
        skip_nonfinite: bool,
        threads: int,
        stats: int,
    ) -> None: ...
    def replicas_step(
        self,
        scalars: Sequence[tuple[float, float, float, float, float, float]],
        skip_nonfinite: bool,
        threads: int,
        stats: int,
    ) -> None: ...
    def adaptive_step(
        self,
        step_sizes: Sequence[float],
        bias_corrections2_sqrt: Sequence[float],
        c1: float,
        c2: float,
        weight_decay: float,
        one_minus_beta1: float,
        beta2: float,
        one_minus_beta2: float,
        eps: float,
        skip_nonfinite: bool,
        threads: int,
        stats: int,
    ) -> None: ...

class TensorReader:
    @staticmethod
    def of(exchange_api: object, types: list[type], is_neg: object, storage_offset: object) -> TensorReader | None: ...
    def read(
        self,
        kind: int,
        params: list[Tensor],
        grads1: list[Tensor],
        grads2: list[Tensor] | None,
        kept1: list[Tensor] | None,
        kept2: list[Tensor] | None,
    ) -> StepTensors | None: ...

def step_per_sample(
    params: list[int],
    grads1: list[int],
    grads2: list[int],
    sizes: list[int],
    is_double: list[bool],
    samples1: int,
    samples2: int,
    rate: float,
    c1: float,
    c2: float,
    weight_decay: float,
    threads: int,
    sq_norms: int,
    stats: int,
) -> None: ...

class LayerOperands:
    def __init__(
        self,
        is_double: bool,
        input_strides: Sequence[int],
        output_strides: Sequence[int],
        sizes: Sequence[int],
    ) -> None: ...
    def weight_grad(
        self,
        inputs: int,
        output_grads: int,
        segment_ends: Sequence[int],
        grad: int,
        grad_strides: Sequence[int],
        sq_norms: int,
        loop_order: int,
        threads: int,
        segment_stride: int = 0,
        weights: int = 0,
        order: int = 0,
        segment_gram: int = 0,
        step: Sequence[float] = (),
        weight_sq_norm: int = 0,
    ) -> None: ...
    def weight_gram(self, inputs: int, output_grads: int, sq_norms: int, threads: int) -> None: ...

def philox_normal(out: int, is_double: bool, size: int, first: int, key: tuple[int, int], draw: int) -> None: ...
def affine_walk(
    x: int,
    is_double: bool,
    size: int,
    steps: int,
    keep: float,
    shift: float,
    slope: float,
    spread: float,
    weights: Sequence[float],
    key: tuple[int, int],
    draw: int,
    threads: int,
) -> None: ...

class NormShape:
    def __init__(
        self, sizes: Sequence[int], channels_last: bool, is_double: bool, relu: bool, eps: float, threads: int
    ) -> None: ...

def norm_relu(shape: NormShape, arrays: Sequence[int]) -> None: ...
def norm_relu_grad(shape: NormShape, arrays: Sequence[int]) -> None: ...

class ReplicaNet:
    def __init__(self, layers: list[list[int]], eps: list[float], squared_error: bool) -> None: ...
    @property
    def scratch(self) -> int: ...
    @property
    def samples(self) -> int: ...

class Replicas:
    def __init__(
        self,
        net: ReplicaNet,
        weights: int,
        parameters: int,
        frozen: int,
        frozen_stride: int,
        order: list[int],
        threads: int,
        scratch: int,
        slots: int,
    ) -> None: ...
    def advance(
        self,
        runs: list[tuple[int, int, float, float, float, float, list[int], list[float], int, int, int]],
        data: tuple[int, int, int],
        count: int,
        measure_every: int,
        sums: int,
        steps: int,
        diverged: int,
    ) -> None: ...
    def evaluate(self, runs: int, data: tuple[int, int, int], count: int, losses: int, right: int) -> None: ...
    def gradient(self, runs: int, data: tuple[int, int, int], count: int, indices: list[int], grads: int) -> None: ...

# Only in a build with CUDA:
def cuda_step(
    tensors: StepTensors,
    rate: float,
    c1: float,
    c2: float,
    weight_decay: float,
    momentum64: float,
    momentum32: float,
    device_coefficients: int,
    skip_nonfinite: bool,
    scale: int,
    found_inf: int,
    replicas: int,
    device: int,
    stream: int,
    workspace: int,
    stats: int,
) -> None: ...
def cuda_step_workspace(tensors: StepTensors, replicas: int) -> int: ...
def cuda_step_per_sample(
    params: list[int],
    grads1: list[int],
    grads2: list[int],
    sizes: list[int],
    dtypes: list[int],
    samples1: int,
    samples2: int,
    rate: float,
    c1: float,
    c2: float,
    weight_decay: float,
    device: int,
    stream: int,
    workspace: int,
    sq_norms: int,
    stats: int,
) -> None: ...
def cuda_step_per_sample_workspace(sizes: list[int], dtypes: list[int], samples: int) -> int: ...
