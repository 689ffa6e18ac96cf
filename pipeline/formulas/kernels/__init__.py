"""The inner loops of losses and metrics: smooth ranks, sorting, pairs; private."""
