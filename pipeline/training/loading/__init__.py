"""Batches made ahead of the steps, by processes of their own.

`loader` says what is to be made and hands it out, `pool` has it made, by processes or by a thread
here, `making` is what they do, in the memory of `frames` that all of them share; `waiting` says how
long a device had nothing to do, and why. What a process imports (`process`, `making`, `frames`,
`augmentation`) does without torch.
"""
