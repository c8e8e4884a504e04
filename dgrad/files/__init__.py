"""Files: written whole or not at all, and images. Free of torch."""
