"""Weights as such: how they do on val, and models made of weights without a step."""
