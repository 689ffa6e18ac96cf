"""The trained model as MLflow serves it (the other half of _track: it needs MLflow's base class)."""

import mlflow


class TrackedModel(mlflow.pyfunc.PythonModel):
    """Unit vectors of texts (str) or of images (bytes of a JPEG or PNG), a list of D numbers each."""

    def load_context(self, context) -> None:
        from pipeline.train import load_model

        self.model, self.vocabulary, self.recipe = load_model(context.artifacts["model"])

    # No type hints: MLflow would take them for a schema, and texts and images are two.
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
