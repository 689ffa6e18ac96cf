"""The trained model as MLflow serves it: MLflow runs this file when it loads the model."""

import warnings

import mlflow

# MLflow asks for type hints on `predict` and takes them for a schema; texts and images are two.
warnings.filterwarnings("ignore", message=".*Add type hints to the `predict` method")


class TrackedModel(mlflow.pyfunc.PythonModel):
    """Unit vectors, lists of D numbers, of texts (str) or of images (bytes of a JPEG or PNG)."""

    def load_context(self, context) -> None:
        from pipeline.train import load_model

        self.model, self.vocabulary, self.recipe = load_model(context.artifacts["model"])

    def predict(self, context, model_input, params=None):
        import numpy as np
        import torch

        from pipeline._batches import decode

        items = list(model_input)
        with torch.inference_mode():
            if isinstance(items[0], str):
                words, lengths = self.vocabulary.encode(items, self.recipe.model.max_words)
                return self.model.encode_text(words, lengths).tolist()
            size = self.recipe.model.image_size
            images = np.stack([decode(item, size) for item in items])
            return self.model.encode_image(torch.from_numpy(images)).tolist()


mlflow.models.set_model(TrackedModel())
