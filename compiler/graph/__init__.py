"""The graph: ONNX in memory, its builder, its evaluator, its verifier."""
