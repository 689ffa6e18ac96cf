"""Encoders that come with weights in Python packages, and what follows an encoder.

`packaged` finds and checks the weights, `efficientnet` is a picture's encoder for machines that
reach no model hub, `projection` leads from any encoder's vector into the space of both towers.
"""
