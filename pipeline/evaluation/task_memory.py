"""What a task takes of its node's memory beyond Python and its libraries (bytes), by its stage.

Ray places tasks by it. What was measured stands in docs/scale.md; where a formula is above, it is
on the safe side.
"""

from pipeline.storage.run_folder import Files
from schemas.settings import Recipe

FIXED = 250e6  # of a shard's rankings: blocks of scores, first candidates, what is compiled
ROW = 100.0  # of an image and of a text of the gallery: rows, places, errors of their codes
SPAN = 2**16  # captions whose sentence vectors are held at a time (graded_relevance.SPAN)
JUDGED = 14.0  # of a number of those vectors
PLACES = 16.0  # of a query and candidate of a block of relevance
SCORED = 8.0  # of a number of the tower vectors, and of the bank's, where other scores are made
MADE = 85.0  # of a query and candidate of a block there
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
    """Of a shard's rankings: rows of the split, and a block of its relevance.

    `vectors` and `captions` are the split's tower and sentence vectors, which are mapped; where
    other scores are made, all tower vectors and the bank's are held.
    """
    images, texts = (sum(entry[of] for entry in vectors.entries) for of in ("images", "captions"))
    judging = sum(e["captions"] * e["dim"] for e in captions.entries) if captions else 0
    return rankings(images, texts, judging, recipe, scored)


def rankings(images: int, texts: int, judging: int, recipe: Recipe, scored: bool) -> int:
    """The same of so many images and texts; `judging` are the numbers of the sentence vectors."""
    span, width = min(SPAN, texts), judging / max(1, texts)
    plain = FIXED + ROW * (images + texts) + span * (JUDGED * width + PLACES * BLOCK)
    if not scored:
        return int(plain)
    towers = (images + texts) * recipe.model.dim
    bank = recipe.rerank.bank_images * (1 + texts / max(1, images)) * recipe.model.dim
    return int(plain + SCORED * (towers + bank) + MADE * BLOCK * max(images, texts))
