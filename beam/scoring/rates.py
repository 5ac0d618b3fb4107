"""Numbers of a term that may differ by request, beside its statistics."""

import numpy as np
import torch
from torch import Tensor

from ..arguments import PerRequest


def on_rows(argument: PerRequest[float], rows: int, device: torch.device) -> Tensor:
    """float32 ``[R, 1]``: the number of each row's request."""
    if argument.shared:
        return torch.full((rows, 1), argument.values[0], dtype=torch.float32, device=device)
    values = np.repeat(np.asarray(argument.values, np.float32), rows // len(argument.values))
    return torch.from_numpy(values).to(device, non_blocking=True)[:, None]
