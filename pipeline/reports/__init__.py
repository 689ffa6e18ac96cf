"""Everything people look at: pages, figures, pictures. `render.py` first."""
