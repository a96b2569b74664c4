"""What a run tells others than its own folder: Weights & Biases, TensorBoard, or nobody."""
