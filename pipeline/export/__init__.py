"""A trained model handed on in the forms that other libraries load.

Open `forms` first. `hugging_face`, `sentences`, `openclip` and `graphs` (ONNX, torch.export) each
write a form and read it back by the library that it is for; `plain` has towers as graphs can hold
them, `writing` what the forms share.
"""
