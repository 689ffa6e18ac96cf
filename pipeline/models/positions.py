"""Tables of positions, interpolated for larger or smaller images and for longer captions."""

import torch
from torch import nn
from torch.nn.functional import interpolate

KEPT = 20  # first places of a text's table that stay, as in Long-CLIP: captions mostly end there


def fitted(model: nn.Module, other: nn.Module, config) -> nn.Module:
    """`other`, of the same kind with other tables of positions, with the weights of `model`.

    `config` is `model`'s. Raises ValueError where another tensor than a table does not fit.
    """
    state, wanted = model.state_dict(), other.state_dict()
    vision = getattr(config, "vision_config", config)
    for name, values in state.items():
        shape = wanted[name].shape
        if values.shape == shape:
            continue
        if not values.is_floating_point():  # the places' numbers
            state[name] = wanted[name]
            continue
        if "position" not in name or values.shape[-1] != shape[-1] or values.ndim > 3:
            raise ValueError(f"{name} {list(values.shape)} cannot become {list(shape)}")
        table, places = values.reshape(-1, shape[-1]), shape[:-1].numel()
        if "text" in name or not hasattr(vision, "patch_size"):
            table = text_positions(table, places)
        else:
            side = (
                vision.image_size if isinstance(vision.image_size, int) else max(vision.image_size)
            )
            table = image_positions(table, places, (side // vision.patch_size) ** 2)
        state[name] = table.reshape(shape)
    other.load_state_dict(state)
    return other


def image_positions(table_ND: torch.Tensor, places: int, patches: int) -> torch.Tensor:
    """A table (places, D) of one (N, D) whose last `patches` are a square grid: bicubic.

    Those before the grid, as of a class token, are kept.
    """
    own = len(table_ND) - patches
    side, new = round(patches**0.5), round((places - own) ** 0.5)
    grid_1DHW = table_ND[own:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid_1DHW = interpolate(grid_1DHW, size=(new, new), mode="bicubic", align_corners=False)
    grid_ND = grid_1DHW.permute(0, 2, 3, 1).reshape(new * new, -1)
    return torch.cat([table_ND[:own], grid_ND.to(table_ND.dtype)])


def text_positions(table_ND: torch.Tensor, places: int) -> torch.Tensor:
    """A longer table (places, D) of one (N, D): the first places as they are, the rest linear.

    >>> text_positions(torch.arange(6.0)[:, None], 9).flatten().tolist()
    [0.0, 1.0, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0]
    """
    kept = min(KEPT, len(table_ND) // 3)
    rest_1DN = table_ND[kept:].float().T[None]
    rest_1DN = interpolate(rest_1DN, size=places - kept, mode="linear", align_corners=True)
    return torch.cat([table_ND[:kept], rest_1DN[0].T.to(table_ND.dtype)])
