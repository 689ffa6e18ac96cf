"""Another system's files on the command line: of `halftone score` and `halftone rerank`."""

from pipeline.errors import InputError
from pipeline.storage import store

PROTOCOLS = ("own", "flickr_1k", "coco_5k", "coco_1k", "cxc", "eccv_caption", "given")
FILES = (
    ("embeddings", "Parquet file or folder: id, image_id, modality, vector"),
    ("images", "image vectors (.npy, .npz, FILE.npz:NAME)"),
    ("texts", "text vectors (.npy), in the order of their images"),
    ("matrix", "similarities, images × texts (.npy)"),
    ("rows", "what the rows of --matrix are, where it is as high as wide: images or texts"),
    ("image-ids", "the images' ids, one a line"),
    ("text-ids", "the texts' ids, one a line"),
    ("text-image-ids", "the id of each text's image, one a line (default: as many texts for each)"),
)
KINDS = {  # each names a system by itself
    "embeddings": ("embeddings",),
    "images": ("images", "texts"),
    "matrix": ("matrix",),
    "run-i2t": ("run_i2t", "run_t2i"),
}
BESIDE = {  # options that say more of some kinds
    "image_ids": ("images", "matrix"),
    "text_ids": ("images", "matrix"),
    "text_image_ids": ("images", "matrix"),
    "rows": ("matrix",),
    "image_matrix": ("matrix",),
    "text_matrix": ("matrix",),
}


def arguments(parser, *more: tuple[str, str]) -> None:
    """Add the options of another system, and `more` of them: (flag, what it is)."""
    group = parser.add_argument_group("another system")
    for flag, about in (*FILES, *more):
        group.add_argument(f"--{flag}", default=None, help=about)


def kind(options, *beside: str) -> str | None:
    """Of KINDS the one that the options name; None where they name no system.

    Refuses two systems, and options that say more (`beside`: of any kind) where there is none.
    """
    named = [k for k, names in KINDS.items() if any(getattr(options, n, None) for n in names)]
    if len(named) > 1:
        raise InputError(f"--{named[0]} and --{named[1]} are two systems; give one of them")
    for name, kinds in {**BESIDE, **dict.fromkeys(beside, tuple(KINDS))}.items():
        if getattr(options, name, None) and not set(named) & set(kinds):
            flag, known = name.replace("_", "-"), [k for k in kinds if k in vars(options)]
            raise InputError(f"--{flag} says more of --{', --'.join(known)}; give that with it")
    return named[0] if named else None


def read(options):
    """The system that the options name, as pipeline.evaluation.external reads it."""
    from pipeline.evaluation import external, trec

    o, ids = options, (options.image_ids, options.text_ids, options.text_image_ids)
    match kind(options):
        case "embeddings":
            return external.of_table(store.absolute(o.embeddings))
        case "matrix":
            return external.of_matrix(o.matrix, *ids, rows=o.rows)
        case "images":
            if not (o.images and o.texts):
                raise InputError("--images and --texts are the two sides of a system; give both")
            return external.of_arrays(o.images, o.texts, *ids)
    return trec.read(o.run_i2t, o.run_t2i)
