"""Sparse and int8: training with fake quantization, and the int8 model as an ONNX file or a sparse file."""
