"""A trained network whose layers are compiled for the shape of its training batches."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dc_replay.compilation import CompileMode, compiled, wanted
from dc_replay.networks import FeatureNetwork


class CompiledLayers(nn.Module):
    """Layers that run compiled on batches of one size, and as they are on all others.

    A copy compiles anew, so that it never runs on the weights of the original. One that is frozen,
    as the model of before that distillation asks, runs compiled on the same batches.

    Args:
        layers: The layers.
        batch: Images in a training batch.
        mode: Whether to compile.
        steps: Training steps planned, which decide it where ``mode`` is ``"auto"``.
    """

    def __init__(self, layers: nn.Module, *, batch: int, mode: CompileMode, steps: int) -> None:
        super().__init__()
        self.layers = layers
        self.batch = batch
        self.mode: CompileMode = mode
        self.steps = steps
        self._run: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_run": None}

    def forward(self, images: Tensor) -> Tensor:
        """Apply the layers."""
        if len(images) != self.batch:
            outputs: Tensor = self.layers(images)
            return outputs
        if self._run is None:
            self._run = compiled(self.layers.forward, wanted(self.mode, steps=self.steps))
        outputs = self._run(images)
        return outputs


def compile_layers(
    network: FeatureNetwork, *, batch: int, mode: CompileMode, steps: int
) -> FeatureNetwork:
    """Compile a network's layers in place, see :class:`CompiledLayers`."""
    network.layers = CompiledLayers(network.layers, batch=batch, mode=mode, steps=steps)
    return network
