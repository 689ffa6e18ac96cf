"""Losses, metrics and relevance in plain torch, for any trainer."""
