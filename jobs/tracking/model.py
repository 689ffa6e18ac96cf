"""The trained model as MLflow serves it: MLflow runs this file when it loads the model."""

import mlflow
import pandas


class TrackedModel(mlflow.pyfunc.PythonModel):  # type: ignore[name-defined]
    """Unit vectors, lists of D numbers, one a row: of its `text`, or of its `image`.

    A row holds one of the two; a dictionary of lists has a row for each item. An image is a file's
    bytes (in JSON in base64), a data URI, a path or URI of storage, a PIL image, or an array. It is
    treated as those the model was trained on.
    """

    def load_context(self, context) -> None:
        from pipeline.training.saved_model import load_model

        self.model = load_model(context.artifacts["model"])

    def predict(self, context, model_input: pandas.DataFrame, params=None) -> list[list[float]]:
        from pipeline.errors import InputError
        from pipeline.sharding.images import Rejected

        try:
            model_input = _rows(model_input)
            texts, images = self._given(model_input)
            vectors = dict(zip(texts, self.model.embed_texts(list(texts.values())), strict=True))
            vectors |= zip(images, self.model.embed_images(list(images.values())), strict=True)
        except (InputError, Rejected) as error:
            raise mlflow.MlflowException.invalid_parameter_value(str(error)) from error
        return [vectors[row].tolist() for row in range(len(model_input))]

    def _given(self, table: pandas.DataFrame) -> tuple[dict[int, str], dict]:
        """The texts and the images of a table, by row."""
        from pipeline.errors import InputError

        columns = [name for name in ("text", "image") if name in table]
        if not columns:
            raise InputError(
                "nothing to embed: give a DataFrame, or records, with a column `text` or `image`; "
                "other columns, and lists without columns, are not read"
            )
        texts, images = {}, {}
        for row, values in enumerate(zip(*(table[name] for name in columns), strict=True)):
            there = {n: v for n, v in zip(columns, values, strict=True) if not _missing(v)}
            if len(there) != 1:
                found = " and ".join(there) or "neither"
                raise InputError(f"row {row} holds {found}; give it a text or an image")
            if "image" in there:
                images[row] = _picture(there["image"], row)
            elif isinstance(text := there["text"], str) and text.strip():
                texts[row] = text
            else:
                raise InputError(f"row {row}: text is {text!r:.80}; give it words")
        return texts, images


def _rows(table: pandas.DataFrame) -> pandas.DataFrame:
    """The table; of a dictionary of lists, of which MLflow makes one row, a row for each item."""
    if len(table) != 1:
        return table
    cells = {name: table[name].iloc[0] for name in ("text", "image") if name in table}
    lists = {name: cell for name, cell in cells.items() if isinstance(cell, list)}
    if not lists or any(not _missing(cell) for name, cell in cells.items() if name not in lists):
        return table
    if len({len(cell) for cell in lists.values()}) > 1:
        from pipeline.errors import InputError

        lengths = " and ".join(f"{len(cell)} under {name!r}" for name, cell in lists.items())
        raise InputError(f"the lists differ in length: {lengths}; give each row a text or an image")
    return pandas.DataFrame(
        {name: pandas.Series(cell, dtype=object) for name, cell in lists.items()}
    )


def _missing(value) -> bool:
    return value is None or value is pandas.NA or (isinstance(value, float) and value != value)


def _picture(value, row: int):
    """The picture of a row; of a text that is no data URI, no URI and no file its base64."""
    import os

    from pipeline.sharding.given import base64_bytes
    from pipeline.sharding.images import Rejected

    if not isinstance(value, str) or value[:5].lower() == "data:" or "://" in value:
        return value
    if os.path.isfile(value):
        return value
    try:
        return base64_bytes(value)
    except Rejected as reason:
        said = f"row {row}: image {value[:80]!r} is no file, no data URI and no base64 ({reason})"
        raise Rejected(said) from reason


mlflow.models.set_model(TrackedModel())
