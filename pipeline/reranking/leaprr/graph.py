"""The neighbour-affinity graph of LeaPRR: how much of their neighbourhoods two items share.

A neighbourhood is a set of images and a set of texts, each a list of row numbers; negative numbers
stand for nobody. Two items share what is in both sets of images and in both sets of texts.

Legend of the shape suffixes: B graphs, V nodes of a graph, C neighbours in a list.
"""

import torch

BLOCK = 2**19  # cells of a block's membership table: more do not stay in the cache


def shared(lists_BVC: torch.Tensor) -> torch.Tensor:
    """How many row numbers each two nodes of a graph have in common (B, V, V) float32, exact.

    A graph's own row numbers are counted through, which makes of every list a row of 0 and 1 over
    no more than V × C columns; the product of those rows is what is asked for. A list holds a row
    number once.
    """
    graphs, nodes, length = lists_BVC.shape
    step = max(1, BLOCK // max(1, nodes * nodes * length))
    parts = [_shared(part) for part in lists_BVC.split(step)]
    return torch.cat(parts) if parts else lists_BVC.new_zeros(graphs, nodes, nodes).float()


def _shared(lists_BVC: torch.Tensor) -> torch.Tensor:
    graphs, nodes, length = lists_BVC.shape
    rows = lists_BVC.reshape(graphs, nodes * length)
    # Number the row numbers of a graph from 0: equals, once sorted, do not count on.
    ordered, order = rows.sort(dim=1)
    new = torch.zeros_like(ordered)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    column = torch.empty_like(order).scatter_(1, order, new.cumsum(1).long())
    # A row of 0 and 1 a node: whom its list holds. Negative numbers are nobody: 0.
    member = torch.zeros(graphs, nodes, nodes * length, device=rows.device)
    column = column.view(graphs, nodes, length)
    member.scatter_(2, column, (lists_BVC >= 0).float())
    return member @ member.transpose(1, 2)


def affinity(image_lists_BVC, text_lists_BVC, *, threshold: float) -> torch.Tensor:
    """Ã (B, V, V): each node's shares in its neighbourhood overlaps, rows sum to 1.

    A_ij = |R_i ∩ R_j| / Σ_k |R_i ∩ R_k|, 0 where not above `threshold`, then rows made to sum to 1
    again. A node whose row is empty keeps itself alone. (Paper: threshold λ / V with λ = 0.8.)
    """
    # Overlaps as shares of the row, the small ones cut, and what is left made to sum to 1.
    counts = shared(image_lists_BVC) + shared(text_lists_BVC)
    rows = counts / counts.sum(2, keepdim=True).clamp(min=1)
    rows = rows * (rows > threshold)
    total = rows.sum(2, keepdim=True)
    alone = torch.eye(rows.shape[1], device=rows.device).expand_as(rows)
    return torch.where(total > 0, rows / total.clamp(min=1e-12), alone)
