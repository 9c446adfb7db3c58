"""Published weights: facebookresearch, Hugging Face, torchvision and EfficientNet-Lite names to ours and back."""
