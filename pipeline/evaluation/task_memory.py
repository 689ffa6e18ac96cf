"""What a task takes of its node's memory beyond Python and its libraries (bytes), by its stage.

Ray places tasks by it. What was measured stands in docs/scale.md; where a formula is above, it is
on the safe side.
"""

from pipeline.storage.run_folder import Files
from schemas.settings import Recipe

TOWER = 7.0  # of a number of the tower vectors that are ranked
SCORED = 8.0  # the same, and of the bank's, where other scores are made
JUDGED = 16.0  # of a number of the sentence vectors that rankings are judged by
PLACES = 12.0  # of a query and candidate of a block: scores, relevance, ranks; not measured apart
MADE = 85.0  # the same where other scores are made
BLOCK = 256  # queries at a time


def of_vectors(entry: dict, recipe: Recipe, model: dict) -> int:
    """Of a shard's tower vectors: its samples decoded, and the model, twice while it is read."""
    how = model["pieces"][0].get("preprocessing")
    height, width = how["crop"] or how["resize"] if how else (recipe.model.image_size or 0,) * 2
    pixels = 3 * height * width * entry["samples"]
    held = entry["files"][f"{entry['name']}.tar"]["bytes"]
    weights = sum(f["bytes"] for p in model["pieces"] for f in p["files"].values())
    return (held if recipe.model.image == "regions" else pixels) + 2 * weights


def of_rankings(vectors: Files, captions: Files | None, recipe: Recipe, scored: bool) -> int:
    """Of a shard's rankings: all vectors of the split, those that judge, and a block of scores.

    `vectors` and `captions` are the split's tower and sentence vectors; where other scores are
    made, the bank's vectors count too.
    """
    images, texts = (sum(entry[of] for entry in vectors.entries) for of in ("images", "captions"))
    judging = sum(e["captions"] * e["dim"] for e in captions.entries) if captions else 0
    return rankings(images, texts, judging, recipe, scored)


def rankings(images: int, texts: int, judging: int, recipe: Recipe, scored: bool) -> int:
    """The same of so many images and texts; `judging` are the numbers of the sentence vectors."""
    towers = (images + texts) * recipe.model.dim
    bank = recipe.rerank.bank_images * (1 + texts / max(1, images)) * recipe.model.dim
    block = BLOCK * max(images, texts)
    if scored:
        return int(SCORED * (towers + bank) + JUDGED * judging + MADE * block)
    return int(TOWER * towers + JUDGED * judging + PLACES * block)
