"""Reading Hugging Face checkpoints: where they are, what their config says, their tensors as lazy slices."""
