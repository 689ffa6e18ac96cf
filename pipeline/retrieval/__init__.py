"""Queries against candidates, exactly: who is nearest, and where the positives stand."""
