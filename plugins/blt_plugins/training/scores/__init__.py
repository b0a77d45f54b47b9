"""What a model is judged by: held-out bits per byte, accuracy, accepted drafts, calibration."""
