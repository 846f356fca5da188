"""Several posterior samples of a LoRA model in one forward pass.

:func:`stack` puts the samples into the batch: the frozen base weights are read once for all of them, and each LoRA
layer applies its own A_s, B_s to the rows of sample s by a kernel (:func:`lora_samples_`) that draws the weights while
it uses them, so that they never exist in memory.
"""

from ivon_kernels.lora.factor import Factor
from ivon_kernels.lora.guard import CannotStackError
from ivon_kernels.lora.op import lora_samples_
from ivon_kernels.lora.stacking import Stack, stack

__all__ = ["CannotStackError", "Factor", "Stack", "lora_samples_", "stack"]
