"""Pictures of images, curves and runs."""
