"""The trained model as MLflow serves it: MLflow runs this file when it loads the model."""

import mlflow


class TrackedModel(mlflow.pyfunc.PythonModel):  # type: ignore[name-defined]
    """Unit vectors, lists of D numbers, of texts and of images.

    An image is a data URI (data:image/jpeg;base64,…), so that both travel as strings, over HTTP
    too.
    """

    def load_context(self, context) -> None:
        from pipeline.training.saved_model import load_model

        self.model = load_model(context.artifacts["model"])

    def predict(self, context, model_input: list[str], params=None) -> list[list[float]]:
        return [self._vector(item) for item in model_input]

    def _vector(self, item: str) -> list[float]:
        import base64

        if not item.startswith("data:"):
            return self.model.embed_texts([item])[0].tolist()
        return self.model.embed_images([base64.b64decode(item.split(",", 1)[1])])[0].tolist()


mlflow.models.set_model(TrackedModel())
