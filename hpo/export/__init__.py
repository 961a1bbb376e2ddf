"""What a study leaves: the bundle of a trained model."""
