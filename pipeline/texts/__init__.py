"""Texts as models and search see them: their words, and numbers for these. Needs no torch."""
