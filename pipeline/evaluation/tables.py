"""Recalls as a table in a terminal shows them: those of a direction in one cell."""

RECALLS = ["i2t R@1   5    10", "t2i R@1   5    10"]  # column titles


def recalls(metrics: dict[str, float]) -> list[str]:
    """A cell for each direction: R@1, R@5 and R@10 in percent."""
    return [
        " ".join(f"{metrics[f'{direction}_R_at_{k}']:4.1f}" for k in (1, 5, 10))
        for direction in ("i2t", "t2i")
    ]
