"""What a CUDA device would be waited for, seen without one."""

import torch
from torch.overrides import TorchFunctionMode


class NumbersAssigned(TorchFunctionMode):
    """Collects assignments of Python numbers for which torch copies a scalar to a CUDA device and waits.

    It does so where index tensors say where to write, and where one element is written; a slice it fills by a kernel.
    """

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.__setitem__ and not isinstance(args[2], torch.Tensor):
            tensor, index, value = args
            parts = index if isinstance(index, tuple) else (index,)
            if any(isinstance(part, torch.Tensor) for part in parts) or not tensor[index].dim():
                self.found.append((tuple(tensor.shape), value))
        return function(*args, **(kwargs or {}))
