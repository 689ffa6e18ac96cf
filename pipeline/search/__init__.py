"""Stage 8, a text finds images and a picture captions: `index.py` first."""
